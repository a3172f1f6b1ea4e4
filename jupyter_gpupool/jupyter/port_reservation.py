"""Reserves a kernel's ports while the kernel does not listen: before it is up, and between its death and restart."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterable


class ReservedPorts:
    """Ports that the system gives to no other process, while a process that names a port may still listen on it.

    Jupyter chooses a kernel's ports long before the kernel binds them, and keeps them for a kernel that has died.
    Meanwhile the system may give one of them to another process. Then the kernel cannot start, and Jupyter connects to
    that process instead. If it is a ZeroMQ socket of another type (each ipykernel has one on a port that the system
    chose), ZeroMQ closes the connection, and a send in progress blocks the Jupyter server for ever.

    On Linux, the system does not choose the port of a socket that is bound and does not listen, neither for listeners
    nor for outgoing connections. A process that names the port may listen on it if both sockets set SO_REUSEADDR, as
    ZeroMQ does. Other systems refuse the second socket, so there nothing is reserved.
    """

    def __init__(self) -> None:
        self._sockets: dict[tuple[str, int], socket.socket] = {}

    def reserve(self, ip: str, ports: Iterable[int]) -> None:
        """Reserve these ports and release all others. A port on which somebody listens is skipped."""
        if sys.platform != "linux":
            return
        wanted = {(ip, port) for port in ports}
        for address in self._sockets.keys() - wanted:
            self._sockets.pop(address).close()
        for address in wanted - self._sockets.keys():
            with contextlib.suppress(OSError):
                self._sockets[address] = _bound(address)

    def release(self) -> None:
        """Release all ports."""
        while self._sockets:
            self._sockets.popitem()[1].close()

    def __del__(self) -> None:  # nothing else is called for a kernel that its restarter has given up
        self.release()


def _bound(address: tuple[str, int]) -> socket.socket:
    reserved = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(address)
    except BaseException:
        reserved.close()
        raise
    return reserved

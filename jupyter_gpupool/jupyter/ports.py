"""A kernel's ports stay its own while it does not listen: before it is up, and between a death and the next start."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterable


class KeptPorts:
    """Ports that nobody else is given, though whoever names them may listen.

    Jupyter chooses a kernel's ports long before the kernel binds them, and leaves them to a kernel that has died.
    Whatever else is started meanwhile may be given one of them; then the kernel cannot start again, and what
    Jupyter sends it goes to a stranger: to a socket of another type (each ipykernel has one on a port that the
    system chose) ZeroMQ gives the connection up, and a send that was under way blocks the Jupyter server for ever.

    On Linux a socket that is bound and does not listen keeps the system from choosing its port, for listeners and for
    outgoing connections, while one that names the port may listen on it if both say SO_REUSEADDR, as ZeroMQ does.
    Elsewhere the second would be refused, and nothing is kept.
    """

    def __init__(self) -> None:
        self._sockets: dict[tuple[str, int], socket.socket] = {}

    def keep(self, ip: str, ports: Iterable[int]) -> None:
        """These and no others. One that somebody listens on already is left to them."""
        if sys.platform != "linux":
            return
        wanted = {(ip, port) for port in ports}
        for address in self._sockets.keys() - wanted:
            self._sockets.pop(address).close()
        for address in wanted - self._sockets.keys():
            with contextlib.suppress(OSError):
                self._sockets[address] = _bound(address)

    def let_go(self) -> None:
        while self._sockets:
            self._sockets.popitem()[1].close()

    def __del__(self) -> None:  # a kernel that its restarter gave up is forgotten without a word
        self.let_go()


def _bound(address: tuple[str, int]) -> socket.socket:
    keeper = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    try:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(address)
    except BaseException:
        keeper.close()
        raise
    return keeper

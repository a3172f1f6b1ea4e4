"""Ports of servers that are named before they start, or that start again at the same one."""

from __future__ import annotations

import random
import socket

#: Above those of Ray's workers, and below those that Linux gives to connections and to servers that ask for any port:
#: nobody gets one by chance while its server is down.
_PORTS = range(20000, 32768)
_TRIES = 1000
_RANDOM = random.SystemRandom()  # Hypothesis seeds the usual one alike in every process
_given: set[int] = set()


def free_port() -> int:
    """Return a port at which nobody listens and that this process has not been given before."""
    for port in _RANDOM.sample(_PORTS, _TRIES):
        if port not in _given and _is_free(port):
            _given.add(port)
            return port
    raise OSError(f"none of {_TRIES} ports is free")


def free_ports(count: int) -> list[int]:
    """Return so many of them."""
    return [free_port() for _ in range(count)]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True

"""Connections to a secured server that no client of ours would make."""

from __future__ import annotations

import contextlib
import re
import resource
import socket
import ssl
from collections.abc import Iterator

from ...conftest import PATIENCE_S
from .conftest import Server

#: The beginning of a TLS connection (RFC 8446), cut off.
HELLO = bytes.fromhex("16030100f8010000f40303") + bytes(range(32))


def trusting(server: Server) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=server.ca)


@contextlib.contextmanager
def secured(server: Server) -> Iterator[ssl.SSLSocket]:
    """TLS with the control port; nothing is said yet."""
    plain = socket.create_connection(("localhost", server.port), PATIENCE_S)
    with trusting(server).wrap_socket(plain, server_hostname="localhost") as sock:
        yield sock


def said(server: Server, request: bytes, answers: int = 0) -> bytes:
    """Everything that is answered to just these bytes, until the server hangs up or has no more to say."""
    with secured(server) as sock:
        with contextlib.suppress(OSError):  # it may hang up while it is told
            sock.sendall(request)
        return heard(sock, answers)


def heard(sock: socket.socket, answers: int = 0) -> bytes:
    """What is said until there are so many answers, however long they take, and then silence for a moment."""
    answer = b""
    with contextlib.suppress(OSError):
        while True:
            sock.settimeout(PATIENCE_S if len(statuses(answer)) < answers else 1.0)
            part = sock.recv(65536)
            if not part:
                break
            answer += part
    return answer


def statuses(answer: bytes) -> list[int]:
    """The status of each response in an answer."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


@contextlib.contextmanager
def crowd(port: int, count: int) -> Iterator[list[socket.socket]]:
    """So many connections that have been begun and say nothing, or every seventh a part of a TLS hello. As many
    of them as this process may have are open at once, the latest."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    room = (most - 2000) // 2  # for two crowds at once
    silent: list[socket.socket] = []
    try:
        for n in range(count):
            sock = socket.socket()
            sock.setblocking(False)
            # More addresses than one: a port of the loopback is used again by another of them only.
            sock.bind((f"127.0.0.{2 + n % 8}", 0))
            with contextlib.suppress(BlockingIOError):
                sock.connect(("127.0.0.1", port))
            silent.append(sock)
            if n % 7 == 0:
                with contextlib.suppress(OSError):
                    sock.send(HELLO[: n % len(HELLO)])
            if len(silent) > room:
                silent.pop(0).close()
        yield silent
    finally:
        for sock in silent:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))

"""Many who say nothing, some who say it slowly, and too much of it: who is known gets through all the while."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from jupyter_gpupool.client import requests
from jupyter_gpupool.transport import handshake

from ...conftest import PATIENCE_S, often
from ...support.processes import command_line
from .conftest import Server
from .unauthenticated import HELLO, crowd, heard, said, secured, statuses, trusting

FACTS = {"torch": __import__("torch").__version__, "threads": 1}
MANY = often(1_000, 10_000)


def processes(server: Server) -> dict[str, psutil.Process]:
    """The daemon and its acceptor."""
    assert server.process is not None
    daemon = psutil.Process(server.process.pid)
    (acceptor,) = (
        p for p in daemon.children() if "jupyter_gpupool.engines.local.acceptor" in command_line(p)
    )
    return {"daemon": daemon, "acceptor": acceptor}


def memory(server: Server) -> dict[str, int]:
    return {name: process.memory_info().rss for name, process in processes(server).items()}


@pytest.mark.soak
def test_half_open_connections_on_both_ports(own_server: Server, eventually: Callable[..., Any]) -> None:
    client = own_server.client(own_server.token()["token"])
    request, secret = requests.new_request(partial=0.1)
    lease = requests.acquire(client, request)
    spec = requests.attach_spec(client, lease, secret, "remote")
    line = handshake.connect(spec, "holder", {})[0]
    before = memory(own_server)
    with crowd(own_server.port, MANY), crowd(own_server.data_port, MANY):
        for _ in range(5):
            newcomer = own_server.client(own_server.token()["token"])
            assert newcomer.pool()["healthy"] and client.heartbeat(lease.id)
            handshake.connect(spec, "session", FACTS)[0].close()
        grown = {name: memory(own_server)[name] - before[name] for name in before}
        assert all(mib < 300 << 20 for mib in grown.values()), grown
        control = processes(own_server)["daemon"]
        eventually(lambda: control.num_fds() < 200, "those who have shown no token are turned away")
    line.close()
    log = own_server.log
    assert log.count("\n") < 1000, "a line for each of them fills the disk"
    assert "Traceback" not in log and "Too many open files" not in log


def test_whoever_floods_is_in_their_own_way_only(own_server: Server) -> None:
    """A slow client's connection outlives a flood from another address."""
    plain = socket.create_connection(("127.0.0.1", own_server.port), PATIENCE_S)
    context = ssl.create_default_context(cadata=own_server.ca)
    with context.wrap_socket(plain, server_hostname="localhost") as slow:
        with crowd(own_server.port, 3000):
            own_server.administrator().pool()
        token = own_server.token()["token"]
        slow.sendall(
            f"GET /gpupool/api/v1/pool HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        )
        assert statuses(heard(slow, 1)) == [200]


def test_the_slow_are_turned_away_within_seconds(own_server: Server, eventually: Callable[..., Any]) -> None:
    """Byte by byte, for as long as they are listened to: a hello on both ports, a request's head, half a body."""
    slow: dict[socket.socket, bytes] = {
        socket.create_connection(("127.0.0.1", port), PATIENCE_S): HELLO
        for port in (own_server.port, own_server.data_port)
    }
    post = b"POST /gpupool/api/v1/leases HTTP/1.1\r\nHost: x\r\n"
    for words in (post + b"X-Slow: ", post + b"Content-Length: 900\r\n\r\n{"):
        plain = socket.create_connection(("127.0.0.1", own_server.port), PATIENCE_S)
        slow[trusting(own_server).wrap_socket(plain, server_hostname="localhost")] = words
    sent = 0

    def ended(sock: socket.socket) -> bool:
        try:
            sock.sendall(slow[sock][sent : sent + 1] or b"x")
            sock.settimeout(0.02)
            return sock.recv(100) == b""
        except (TimeoutError, ssl.SSLWantReadError):
            return False
        except OSError:
            return True

    def all_ended() -> bool:
        nonlocal sent
        for sock in [s for s in slow if ended(s)]:
            del slow[sock]
            sock.close()
        sent += 1
        return not slow

    eventually(all_ended, "the server hangs up")
    assert sent > 5, "they were listened to at first"
    assert own_server.administrator().pool()["healthy"]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_two_gib_are_refused_early(server: Server, known: bool, chunked: bool) -> None:
    before = memory(server)["daemon"]
    token = server.token()["token"] if known else "nobody's"
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {2 << 30}"
    head = f"POST /gpupool/api/v1/leases HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n{framing}\r\n\r\n"
    block = bytes(1 << 20)
    sent = 0
    with secured(server) as sock:
        sock.sendall(head.encode())
        with contextlib.suppress(OSError):
            while sent < 2 << 30:
                sock.sendall(b"%x\r\n%s\r\n" % (len(block), block) if chunked else block)
                sent += len(block)
        answer = heard(sock)
    assert sent < 64 << 20, "it was not refused early"
    assert statuses(answer) in ([], [400], [413]), "unless the connection broke first, it is told why"
    assert memory(server)["daemon"] - before < 64 << 20
    assert server.administrator().pool()["healthy"]


def test_a_body_that_is_a_little_too_long(server: Server) -> None:
    token = server.token()["token"]
    head = "POST /gpupool/api/v1/leases HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    answer = said(
        server,
        f"{head}Authorization: Bearer {token}\r\nContent-Length: 70000\r\n\r\n".encode() + b" " * 70000,
        answers=1,
    )
    assert statuses(answer) == [400] and b"65536 are allowed" in answer


def test_older_tls_is_refused_on_both_ports(server: Server) -> None:
    for port in (server.port, server.data_port):
        context = ssl.create_default_context(cadata=server.ca)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["gpupool-worker/00000000-0000-4000-8000-000000000000"])
        plain = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        with plain, pytest.raises(ssl.SSLError, match="(?i)protocol.version|no.application.protocol"):
            context.wrap_socket(plain, server_hostname="localhost")


def test_plain_text_and_garbage_to_control(server: Server) -> None:
    for words in (
        b"GET /gpupool/api/v1/pool HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\xff\xff" + bytes(300),
        b"\x16\x03\x03\x00\x05hello",
        bytes(range(256)) * 40,
        b"",
    ):
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(words)
                sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                answer = sock.recv(1000)
                assert not re.search(rb"HTTP|gpupool|Traceback", answer), answer
    assert server.administrator().pool()["healthy"]

"""Bytes over TLS: all of them arrive, whatever the pieces in which they are sent and read."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jupyter_gpupool.server.daemon import certificates
from jupyter_gpupool.transport import frames, tls

Ends = tuple[tls.SecureSocket, tls.SecureSocket]


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    """Both ends of a connection, which wait for nothing longer than a minute."""
    authority = certificates.new_authority("test")
    pair = certificates.new_server(authority, ["127.0.0.1"])
    certfile, keyfile = tmp_path / "server.crt", tmp_path / "server.key"
    certfile.write_bytes(pair.certificate)
    keyfile.write_bytes(pair.key)
    here, there = socket.socketpair()
    for sock in (here, there):
        sock.settimeout(60.0)
    server = tls.SecureSocket(there, tls.server_context(str(certfile), str(keyfile)))
    client = tls.SecureSocket(here, tls.client_context(), "127.0.0.1")
    shaking = threading.Thread(target=server.handshake)
    shaking.start()
    client.handshake()
    shaking.join()
    with client, server:
        yield client, server


def test_what_is_sent_arrives_in_order_and_then_the_end(ends: Ends) -> None:
    client, server = ends
    dice = random.Random(6)
    content = dice.randbytes((1 << 20) + 5)

    def send() -> None:
        rest = memoryview(content)
        while rest:
            size = dice.choice((1, 16_383, 16_384, 16_385, 300_000))
            frames.send_all(client, rest[:size])
            rest = rest[size:]
        client.shutdown(socket.SHUT_WR)

    sending = threading.Thread(target=send)
    sending.start()
    found, sizes = bytearray(), random.Random(7)
    while True:
        into = bytearray(sizes.choice((1, 5, 16_384, 40_000, 1 << 19)))
        n = server.recv_into(memoryview(into))
        if not n:
            break
        found += into[:n]
    sending.join()
    assert found == content


def test_one_call_reads_all_records_that_have_arrived(ends: Ends) -> None:
    client, server = ends
    frames.send_all(client, bytes(3 * 16_384))
    frames.send_all(client, b"more")
    assert server.recv_into(memoryview(bytearray(1 << 20))) == 3 * 16_384 + 4

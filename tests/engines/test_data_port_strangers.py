"""The data port and those who say what no client says: pieces, records that make no sense, others' leases, replays."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_gpupool.engines.addresses import network
from jupyter_gpupool.engines.local import LocalEngine
from jupyter_gpupool.remote import handshake, tls, wire
from jupyter_gpupool.remote.client_hello import NotTLS, wanted_lease
from jupyter_gpupool.remote.specs import AttachSpec

from .test_data_port import FACTS, SECRET, attach_spec, granted, play, session_of


def hello(spec: AttachSpec, *protocols: str) -> bytes:
    """What a client of ours says first."""
    context = tls.client_context(spec.ca)
    context.set_alpn_protocols(list(protocols) or [tls.protocol_of(spec.lease_id)])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=spec.host).do_handshake()
    return outgoing.read()


def answer(spec: AttachSpec, *pieces: bytes) -> bytes:
    """To these pieces, one after the other, as far as anybody listens."""
    with socket.create_connection((spec.host, spec.port), 20) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        heard = b""
        with contextlib.suppress(OSError):
            for piece in pieces:
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(65536):
                heard += part
        return heard


def certified(heard: bytes) -> bool:
    """Whether it is a worker's side of a handshake, and no mere alert."""
    return len(heard) > 100 and heard[:1] == b"\x16"


def test_what_strangers_say(tmp_path: Path, certificates: Any) -> None:
    async def story(engine: LocalEngine, spec: AttachSpec) -> None:
        lease = granted()
        other = attach_spec(lease, await engine.start_worker(lease), certificates.ca)
        first = hello(spec)

        # In pieces, however small, it is the same hello.
        assert certified(answer(spec, *(first[n : n + 1] for n in range(len(first)))))
        assert certified(answer(spec, first[:5], first[5:]))

        # The same bytes again are no more than a new connection's beginning: their key is not known to who replays.
        recorded = hello(spec)
        for _ in range(3):
            assert certified(answer(spec, recorded))
        assert not certified(answer(spec, recorded[:-1]))

        # The first name of a lease counts, and its worker agrees to no other.
        names = [tls.protocol_of(s.lease_id) for s in (spec, other)]
        assert certified(answer(spec, hello(spec, *names)))
        for wrong in (
            "h2",
            "gpupool-lease/",
            f"gpupool-lease/../{spec.lease_id}",
            f"{names[0]}/../x",
            f"x{names[0]}",
        ):
            assert not certified(answer(spec, hello(spec, wrong))), wrong

        # With the right secret of another lease: nothing.
        with pytest.raises(handshake.Refused, match="the secret is not this lease's"):
            handshake.connect(attach_spec_with(other, "a guess"), "holder", {})

        # Garbage where TLS goes on, and records that lie about their length.
        for rest in (os.urandom(2000), b"\x17\x03\x03\xff\xff", b"\x15\x03\x03\x00\x02\x02\x00", first):
            heard = answer(spec, first, rest)
            assert b"Traceback" not in heard and SECRET.encode() not in heard
        for broken in (
            first[:3] + b"\xff\xff" + first[5:],
            first[:9] + bytes(len(first) - 9),
            first[:43] * 30,
        ):
            assert not certified(answer(spec, broken))
        for each in (spec, other):
            session_of(each).close()

    play(tmp_path, certificates, story)


def attach_spec_with(spec: AttachSpec, secret: str) -> AttachSpec:
    from dataclasses import replace

    return replace(spec, secret=secret)


def test_inside_tls_nothing_is_said_before_the_secret(tmp_path: Path, certificates: Any) -> None:
    """TLS itself anybody can speak who knows a lease's id; the worker listens to a hello then, and a short one."""

    @contextlib.contextmanager
    def inside(spec: AttachSpec) -> Iterator[ssl.SSLSocket]:
        context = tls.client_context(spec.ca)
        context.set_alpn_protocols([tls.protocol_of(spec.lease_id)])
        plain = socket.create_connection((spec.host, spec.port), 20)
        with context.wrap_socket(plain, server_hostname=spec.host) as sock:
            yield sock

    def story(engine: LocalEngine, spec: AttachSpec) -> None:
        long = wire.pack(wire.Kind.HELLO, {"secret": SECRET + "x" * 5000})
        other = wire.pack(wire.Kind.RECORDS, [1, 2, 3])
        for said in (
            long,
            other,
            os.urandom(100),
            b"\x01\xff\xff\xff\xff" + bytes(8),
            b"GET / HTTP/1.1\r\n\r\n",
        ):
            with inside(spec) as sock, contextlib.suppress(OSError):
                sock.sendall(said)
                assert sock.recv(1000) == b""
        session_of(spec).close()
        assert FACTS

    play(tmp_path, certificates, story)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=400)
    | st.binary(max_size=300).map(lambda b: b"\x16\x03\x01" + len(b).to_bytes(2, "big") + b)
)
def test_any_bytes_are_a_lease_or_none(data: bytes) -> None:
    with contextlib.suppress(NotTLS):
        lease = wanted_lease(data)
        assert lease is None or lease.replace("-", "").isalnum() or lease == ""


@pytest.mark.parametrize(
    "address, whose",
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::1"),
        ("unknown", "unknown"),
    ],
)
def test_whose_an_address_is(address: str, whose: str) -> None:
    assert network(address) == whose

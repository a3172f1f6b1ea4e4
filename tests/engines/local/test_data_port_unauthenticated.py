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

from jupyter_gpupool.core.addresses import network
from jupyter_gpupool.engines.local.engine import LocalEngine
from jupyter_gpupool.transport import frames, handshake, tls
from jupyter_gpupool.transport.client_hello import NotTLS, wanted_lease
from jupyter_gpupool.transport.specs import AttachSpec

from ...conftest import PATIENCE_S
from .test_data_port import FACTS, SECRET, attach_spec, granted, play, session_of


def hello(spec: AttachSpec, *protocols: str) -> bytes:
    """What a client of ours says first."""
    context = tls.client_context()
    context.set_alpn_protocols(list(protocols) or [tls.protocol_of(spec.lease_id)])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=spec.host).do_handshake()
    return outgoing.read()


def answer(spec: AttachSpec, *pieces: bytes) -> bytes:
    """To these pieces, one after the other, as far as anybody listens."""
    with socket.create_connection((spec.host, spec.port), PATIENCE_S) as sock:
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
        other = attach_spec(lease, await engine.start_worker(lease))
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
            "gpupool-worker/",
            f"gpupool-worker/../{spec.lease_id}",
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
        context = tls.client_context()
        context.set_alpn_protocols([tls.protocol_of(spec.lease_id)])
        plain = socket.create_connection((spec.host, spec.port), PATIENCE_S)
        with context.wrap_socket(plain, server_hostname=spec.host) as sock:
            yield sock

    def story(engine: LocalEngine, spec: AttachSpec) -> None:
        long = frames.pack(frames.Kind.HELLO, {"secret": SECRET + "x" * 5000})
        other = frames.pack(frames.Kind.RECORDS, [1, 2, 3])
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
    try:
        lease = wanted_lease(data)
    except NotTLS:
        return
    if lease is None:
        assert not is_whole_record(data)
    else:
        assert is_whole_record(data)
        assert not lease or tls.protocol_of(lease).encode() in data


def is_whole_record(data: bytes) -> bool:
    return len(data) >= 5 and len(data) >= 5 + int.from_bytes(data[3:5], "big")


def sized(content: bytes, size: int) -> bytes:
    """TLS's vectors: their length in ``size`` bytes, and their content."""
    return len(content).to_bytes(size, "big") + content


def client_hello(protocols: list[bytes], others: list[tuple[int, bytes]]) -> bytes:
    """One record, written as RFC 8446 says, with the ALPN extension among others."""
    alpn = (16, sized(b"".join(sized(name, 1) for name in protocols), 2))
    middle = len(others) // 2
    extensions = [*others[:middle], alpn, *others[middle:]]
    body = b"\x03\x03" + bytes(32) + sized(b"session", 1) + sized(b"\x13\x01", 2) + sized(b"\x00", 1)
    body += sized(b"".join(kind.to_bytes(2, "big") + sized(content, 2) for kind, content in extensions), 2)
    return b"\x16\x03\x01" + sized(b"\x01" + sized(body, 3), 2)


LEASE = st.text("abcdef0123456789-", min_size=1, max_size=36).filter(lambda name: name.strip("-"))
OTHER_EXTENSIONS = st.lists(st.tuples(st.integers(17, 65535), st.binary(max_size=20)), max_size=4)


@settings(max_examples=100, deadline=None)
@given(lease=LEASE, other=LEASE, extensions=OTHER_EXTENSIONS, cut=st.floats(0, 1, exclude_max=True))
def test_a_client_hello_names_its_first_lease(
    lease: str, other: str, extensions: list[tuple[int, bytes]], cut: float
) -> None:
    names = [b"http/1.1", tls.protocol_of(lease).encode(), tls.protocol_of(other).encode()]
    whole = client_hello(names, extensions)
    assert wanted_lease(whole) == lease
    assert wanted_lease(whole + b"more") == lease
    assert wanted_lease(whole[: int(len(whole) * cut)]) is None, "more is to come"
    assert wanted_lease(client_hello([b"http/1.1"], extensions)) == ""


@pytest.mark.parametrize(
    ("address", "whose"),
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

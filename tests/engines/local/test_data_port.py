"""One port for all workers: who gets through to which, by which TLS, and who does not."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import ssl
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from jupyter_gpupool.core.models import Lease, LeaseState, Request, Slice, WorkerAddress
from jupyter_gpupool.engines.local.engine import LocalEngine
from jupyter_gpupool.transport import frames, handshake, proofs, tls
from jupyter_gpupool.transport.lifeline import Lifeline
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec

from ...conftest import PATIENCE_S
from ...support.interceptor import Interceptor, answering, welcoming

torch = pytest.importorskip("torch", reason="workers need PyTorch")

SECRET = "known to the client alone"
FACTS = {"torch": torch.__version__, "threads": 1}


def granted() -> Lease:
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    request = Request(str(uuid.uuid4()), "somebody", memory_mib=1000, secret_sha256=digest)
    piece = Slice("GPU-x", "here", 0, "Tesla V100-PCIE-32GB (emulated)", 1000, 32510, True)
    return Lease(request, LeaseState.GRANTED, (piece,))


@contextlib.asynccontextmanager
async def running(tmp_path: Path, certificates: Any, **options: Any) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(
        run_dir=str(tmp_path / "run"),
        emulate="always",
        certfile=str(certificates.certfile),
        data_host="127.0.0.1",
        attach_timeout_s=600.0,
        **options,
    )
    await engine.start(lambda lease_id, state, reason: None)
    try:
        yield engine
    finally:
        await engine.stop()


def attach_spec(lease: Lease, worker: WorkerAddress) -> AttachSpec:
    piece = lease.slices[0]
    device = DeviceSpec(0, piece.gpu_uuid, piece.name, piece.memory_mib, piece.total_mib, True)
    return AttachSpec(lease.id, worker.host, worker.port, SECRET, (device,), lease.ttl_s, secure=True)


def play(
    tmp_path: Path, certificates: Any, story: Callable[[LocalEngine, AttachSpec], Any], **options: Any
) -> None:
    """The story with an engine and one worker behind its data port, in a thread of its own."""

    async def main() -> None:
        async with running(tmp_path, certificates, **options) as engine:
            lease = granted()
            worker = await engine.start_worker(lease)
            spec = attach_spec(lease, worker)
            result = story(engine, spec)
            if asyncio.iscoroutine(result):
                await result

    asyncio.run(main())


def session_of(spec: AttachSpec) -> tls.Connection:
    return handshake.connect(spec, "session", FACTS)[0]


def acceptor_of(engine: LocalEngine) -> psutil.Process:
    assert engine._door is not None and engine._door._process is not None
    return psutil.Process(engine._door._process.pid)


def test_each_lease_behind_one_port(tmp_path: Path, certificates: Any) -> None:
    async def story(engine: LocalEngine, first: AttachSpec) -> None:
        lease = granted()
        second = attach_spec(lease, await engine.start_worker(lease))
        assert first.port == second.port
        lines = [Lifeline(spec) for spec in (first, second)]
        with pytest.raises(handshake.Refused, match="the secret is not this lease's"):
            session_of(replace(first, secret="a guess"))
        lines[0].release()
        assert lines[1].alive
        with session_of(second):
            pass
        lines[1].release()

    play(tmp_path, certificates, story)


def test_operators_and_copies_through_tls(tmp_path: Path, certificates: Any) -> None:
    """What is computed is right, in both directions at once: uploads beside answers, views beside errors."""
    from jupyter_gpupool.pytorch.client import session

    def story(engine: LocalEngine, spec: AttachSpec) -> None:
        line = Lifeline(spec)
        session.activate(spec)
        try:
            host = torch.randn(1 << 21)
            there = host.to("cuda")
            for _ in range(20):
                there = there + host.to("cuda")
            assert torch.equal(there.cpu(), sum_of(host, 21))
            with pytest.raises(RuntimeError):
                torch.ones(2, device="cuda") @ torch.ones(3, device="cuda")
            assert torch.ones(3, device="cuda").sum().item() == 3
        finally:
            session.deactivate()
            line.release()

    play(tmp_path, certificates, story)


def sum_of(x: Any, times: int) -> Any:
    total = x.clone()
    for _ in range(times - 1):
        total = total + x
    return total


def names(spec: AttachSpec) -> list[str]:
    return tls.offered_for(spec.lease_id)


def test_who_stands_between_learns_nothing_and_gets_nowhere(tmp_path: Path, certificates: Any) -> None:
    """Even with a certificate of the pool's own authority, as somebody has who got hold of the server's key."""

    async def story(engine: LocalEngine, spec: AttachSpec) -> None:
        lease = granted()
        other = attach_spec(lease, await engine.start_worker(lease))
        with (
            Interceptor((spec.host, spec.port), names(spec)) as between,
            pytest.raises(handshake.Refused, match="somebody between the client and the worker"),
        ):
            await asyncio.to_thread(session_of, replace(spec, port=between.port))
        assert b"sealed" in between.heard and SECRET.encode() not in between.heard
        # What the worker says to somebody who has its secret is of no use for another connection to it.
        conn = await asyncio.to_thread(session_of, spec)
        assert isinstance(conn, tls.SecureSocket)
        proof = proofs.proof(proofs.digest_of(SECRET), conn.digest)
        conn.close()
        for welcome in ({}, {"proof": b""}, {"proof": proof}, {"proof": proof.hex()}):
            with (
                Interceptor((spec.host, spec.port), names(spec), welcoming(**welcome)) as between,
                pytest.raises(handshake.Refused, match="does not prove .* may be intercepting"),
            ):
                await asyncio.to_thread(session_of, replace(spec, port=between.port))
        for each in (spec, other):
            (await asyncio.to_thread(session_of, each)).close()

    play(tmp_path, certificates, story)


@pytest.mark.parametrize(
    ("kind", "header", "said"),
    [
        (frames.Kind.REFUSED, {"message": "no\x1b[2J, " + "x" * 5000}, r"^no \[2J, x{900,1000}$"),
        (frames.Kind.REFUSED, [1], "no reason is given"),
        (frames.Kind.REFUSED, {"moved": ["elsewhere", "x"]}, "no reason is given"),
        (frames.Kind.WELCOME, {"proof": b"", "x": "x" * (2 << 20)}, "longer than"),
        (frames.Kind.WELCOME, None, "expected a welcome"),
    ],
)
def test_what_anybody_may_answer_harms_no_client(kind: frames.Kind, header: object, said: str) -> None:
    spec = AttachSpec("lease", "127.0.0.1", 0, SECRET, (), secure=True)
    with (
        Interceptor(("", 0), names(spec), answering(kind, header)) as between,
        pytest.raises((handshake.Refused, frames.WireError), match=said),
    ):
        session_of(replace(spec, port=between.port))


def test_each_worker_has_a_certificate_of_its_own(tmp_path: Path, certificates: Any) -> None:
    async def story(engine: LocalEngine, spec: AttachSpec) -> None:
        lease = granted()
        other = attach_spec(lease, await engine.start_worker(lease))
        shown = []
        for each in (spec, other):
            conn = await asyncio.to_thread(session_of, each)
            assert isinstance(conn, tls.SecureSocket)
            with conn:
                shown.append(conn.digest)
        server = ssl.PEM_cert_to_DER_cert(certificates.certfile.read_text())
        assert len({*shown, hashlib.sha256(server).digest()}) == 3

    play(tmp_path, certificates, story)


def test_a_client_of_an_earlier_version_is_told_that_it_is_one(tmp_path: Path, certificates: Any) -> None:
    def story(engine: LocalEngine, spec: AttachSpec) -> None:
        context = ssl.create_default_context(cadata=certificates.ca)
        context.set_alpn_protocols([names(spec)[1]])
        sock = socket.create_connection((spec.host, spec.port), PATIENCE_S)
        with sock, pytest.raises(ssl.SSLError, match="(?i)protocol.version"):
            context.wrap_socket(sock, server_hostname=spec.host)
        session_of(spec).close()

    play(tmp_path, certificates, story)


@pytest.mark.parametrize("known", ["gpupool-lease/lease", "another"])
def test_a_worker_of_an_earlier_version_is_told_apart(known: str) -> None:
    spec = AttachSpec("lease", "127.0.0.1", 0, SECRET, (), secure=True)
    with (
        Interceptor(("", 0), [known], welcoming()) as earlier,
        pytest.raises(handshake.Refused, match="of an earlier version; install the same version"),
    ):
        session_of(replace(spec, port=earlier.port))


def test_nothing_older_than_tls_1_3(tmp_path: Path, certificates: Any) -> None:
    def story(engine: LocalEngine, spec: AttachSpec) -> None:
        context = tls.client_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols([tls.protocol_of(spec.lease_id)])
        sock = socket.create_connection((spec.host, spec.port), PATIENCE_S)
        with sock, pytest.raises(ssl.SSLError, match="(?i)protocol.version"):
            context.wrap_socket(sock, server_hostname=spec.host)
        session_of(spec).close()

    play(tmp_path, certificates, story)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\xff\xff",
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
        frames.pack(frames.Kind.HELLO, {"protocol": 3, "secret": SECRET, "role": "holder"}),
    ],
)
def test_what_is_no_client_is_turned_away(tmp_path: Path, certificates: Any, said: bytes) -> None:
    def story(engine: LocalEngine, spec: AttachSpec) -> None:
        with socket.create_connection((spec.host, spec.port), PATIENCE_S) as sock:
            with contextlib.suppress(OSError):  # it may hang up at any point
                sock.sendall(said)
                sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert len(sock.recv(100)) <= 7, "no more than an alert"
        session_of(spec).close()

    play(tmp_path, certificates, story)


def test_a_lease_that_has_no_worker(tmp_path: Path, certificates: Any) -> None:
    def story(engine: LocalEngine, spec: AttachSpec) -> None:
        for unknown in (str(uuid.uuid4()), "x"):
            with pytest.raises(frames.ConnectionLost, match="no worker answers .* has the lease ended"):
                session_of(replace(spec, lease_id=unknown))

    play(tmp_path, certificates, story)


def test_a_stolen_secret_is_worth_nothing_after_the_release(tmp_path: Path, certificates: Any) -> None:
    async def story(engine: LocalEngine, spec: AttachSpec) -> None:
        line = Lifeline(spec)
        session = session_of(spec)
        line.release()
        await engine.stop_worker(spec.lease_id)
        with pytest.raises(frames.ConnectionLost, match="has the lease ended"):
            session_of(spec)
        session.settimeout(PATIENCE_S)
        with pytest.raises(ConnectionError):
            while True:
                frames.receive(session)

    play(tmp_path, certificates, story)


def test_half_open_connections_and_the_patient_ones(tmp_path: Path, certificates: Any) -> None:
    """Ten thousand that say nothing, and some that say it byte by byte: a client gets through all the while."""

    def story(engine: LocalEngine, spec: AttachSpec) -> None:
        before = acceptor_of(engine).memory_info().rss
        address = (spec.host, spec.port)
        silent = []
        hello = bytes.fromhex("16030100f8010000f40303") + os.urandom(32)
        for n in range(10_000):
            sock = socket.socket()
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(address)
            silent.append(sock)
            if n % 7 == 0:
                with contextlib.suppress(OSError):
                    sock.send(hello[: n % len(hello)])
            if len(silent) > 900:  # this process may have few files open; the server cannot tell
                silent.pop(0).close()
            if n % 1000 == 0:
                session_of(spec).close()
        assert acceptor_of(engine).memory_info().rss - before < 64 << 20
        session_of(spec).close()
        for sock in silent:
            sock.close()

    play(tmp_path, certificates, story)


def test_many_at_once_all_get_through(tmp_path: Path, certificates: Any) -> None:
    """More than the system keeps for a worker that is slow to take them."""

    async def story(engine: LocalEngine, spec: AttachSpec) -> None:
        line = Lifeline(spec)
        found = await asyncio.gather(*(asyncio.to_thread(session_of, spec) for _ in range(40)))
        assert len(found) == 40
        for session in found:
            session.close()
        line.release()

    play(tmp_path, certificates, story)


def test_an_acceptor_that_dies_is_replaced(tmp_path: Path, certificates: Any) -> None:
    async def story(engine: LocalEngine, spec: AttachSpec) -> None:
        line = Lifeline(spec)
        first = acceptor_of(engine)
        first.send_signal(signal.SIGKILL)
        # Whoever comes meanwhile waits in the listening socket, which the engine holds as well.
        session = await asyncio.to_thread(session_of, spec)
        assert acceptor_of(engine).pid != first.pid and line.alive
        session.close()
        line.release()

    play(tmp_path, certificates, story)


def test_the_port_outlives_its_pool(tmp_path: Path, certificates: Any) -> None:
    """Workers of a pool that is gone are reached still; its successor takes over the port and the workers."""

    async def main() -> None:
        lease = granted()
        async with running(tmp_path, certificates, persistent=True) as engine:
            worker = await engine.start_worker(lease)
            spec = attach_spec(lease, worker)
            line = await asyncio.to_thread(Lifeline, spec)
            old = acceptor_of(engine)
        # Nobody but the acceptor holds the port now.
        (await asyncio.to_thread(session_of, spec)).close()
        async with running(tmp_path, certificates, persistent=True, data_port=worker.port) as engine:
            adopted = await engine.adopt([replace(lease, worker=worker)])
            assert adopted == {lease.id: worker}
            (await asyncio.to_thread(session_of, spec)).close()
            assert acceptor_of(engine).pid != old.pid and line.alive
            await asyncio.to_thread(old.wait, PATIENCE_S)
            new = acceptor_of(engine)
            line.release()
        await asyncio.to_thread(new.wait, PATIENCE_S)  # with no worker left

    asyncio.run(main())

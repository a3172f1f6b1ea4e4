"""How long a server with eight idle leases of 256 MiB takes to be empty, over links of several rates.

Both servers, and the link, share the cores of this machine. ``bound_of_this_machine_s`` is what its cores take at
least: every byte is encrypted, decrypted, and written to memory that its new worker has not touched before. The
system's part in sending, and the link's, come on top.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import mmap
import os
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from jupyter_gpupool.core.models import Lease, LeaseState, Request, Slice, WorkerAddress
from jupyter_gpupool.engines.local.engine import LocalEngine
from jupyter_gpupool.pytorch.client import session
from jupyter_gpupool.server.daemon import certificates
from jupyter_gpupool.transport import tls
from jupyter_gpupool.transport.lifeline import Lifeline
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec

from .link import Link

GOALS = {
    "at_1_gbit_to_bytes_over_link": ("<=", 1.3),
}

LEASES, LEASE_BYTES = 8, 256 << 20
#: As many as the pool moves at once.
AT_ONCE = 4
_SECRET = "of one benchmark"


@dataclass
class _Held:
    lease: Lease
    worker: WorkerAddress
    line: Lifeline


class _Farm:
    """Two servers with certificates on this machine, and a link of any rate before each."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        authority = certificates.new_authority("benchmark")
        pair = certificates.new_server(authority, ["127.0.0.1"])
        self.certificate = certfile, keyfile = folder / "server.crt", folder / "server.key"
        certfile.write_bytes(pair.certificate)
        keyfile.write_bytes(pair.key)
        self.engines = [
            LocalEngine(
                run_dir=str(folder / f"server{k}"),
                emulate="always",
                attach_timeout_s=60.0,
                certfile=str(certfile),
                keyfile=str(keyfile),
            )
            for k in range(2)
        ]
        for engine in self.engines:
            self.do(engine.start(lambda *_: None))
            self.do(engine.until_warm())
        self.at = 0
        self.held: list[_Held] = []

    def do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def hold(self, number: int) -> None:
        """Start a lease with 256 MiB of numbers, which its program has left idle."""
        digest = hashlib.sha256(_SECRET.encode()).hexdigest()
        piece = Slice("GPU-emulated", "here", 0, "emulated", 1024, 32768, True)
        request = Request(f"benchmark-{number}", "me", memory_mib=1024, secret_sha256=digest)
        lease = Lease(request, LeaseState.GRANTED, (piece,))
        worker = self.do(self.engines[0].start_worker(lease))
        device = DeviceSpec(0, piece.gpu_uuid, piece.name, piece.memory_mib, piece.total_mib, True)
        spec = AttachSpec(lease.id, worker.host, worker.port, _SECRET, (device,), secure=True)
        line = Lifeline(spec)
        session.activate(spec)
        self.held.append(_Held(lease, worker, line))

    def drain(self, port: int) -> float:
        """Move every lease to the other server, to whose port that port leads. Return the seconds."""
        began = time.perf_counter()
        self.do(self._drain(port))
        self.at = 1 - self.at
        return time.perf_counter() - began

    async def _drain(self, port: int) -> None:
        here, there = self.engines[self.at], self.engines[1 - self.at]
        at_once = asyncio.Semaphore(AT_ONCE)

        async def move(one: _Held) -> None:
            async with at_once:
                to = await there.receive_worker(one.lease)
                await here.moving.send(one.lease.id, replace(to, port=port or to.port))
                await there.moving.serve(one.lease.id)
                await here.moving.leave(one.lease.id, to)
                one.worker = to

        await asyncio.gather(*map(move, self.held))

    def stop(self) -> None:
        for one in self.held:
            one.line.release()
        for engine in self.engines:
            self.do(engine.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)


def run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gpupool-bench-") as folder:
        farm = _Farm(Path(folder))
        try:
            with _programs(farm):
                return _measure(farm)
        finally:
            farm.stop()


@contextlib.contextmanager
def _programs(farm: _Farm) -> Iterator[None]:
    """A program of each lease, in this process: its session stays while the next one begins."""
    sessions = []
    try:
        for number in range(LEASES):
            farm.hold(number)
            tensor = torch.full((LEASE_BYTES // 4,), float(number)).cuda()
            torch.cuda.synchronize()
            sessions.append((session.attachment.current(), tensor))
            session.attachment.end("another lease is next")  # it is not closed
        yield
        for number, (one, tensor) in enumerate(sessions):
            session.attachment.begin(one)
            assert tensor[-1].item() == number and tensor.sum().item() == number * (LEASE_BYTES // 4)
            session.attachment.end("it is over")
    finally:
        for one, _ in sessions:
            one.close()


def _measure(farm: _Farm) -> dict[str, Any]:
    total = LEASES * LEASE_BYTES
    farm.drain(0)  # the second server's memory is touched for the first time
    farm.drain(0)
    direct_s = min(farm.drain(0), farm.drain(0))
    tls_rate, touch_rate = _tls_rate(farm), _first_touch()
    least_s = total * (1 / tls_rate + 1 / touch_rate) / (os.cpu_count() or 1)
    figures: dict[str, Any] = {
        "tls_of_one_core_gib_per_s": round(tls_rate / (1 << 30), 2),
        "first_touch_gib_per_s": round(touch_rate / (1 << 30), 2),
        "bound_of_this_machine_s": round(least_s, 2),
        "loopback_s": round(direct_s, 2),
        "loopback_gib_per_s": round(total / direct_s / (1 << 30), 2),
        "loopback_to_bound_of_this_machine": round(direct_s / least_s, 2),
    }
    ports = [engine.listens_on for engine in farm.engines]
    for gbit_per_s in (10, 1):
        with Link(("127.0.0.1", ports[1 - farm.at])) as link:
            # The link paces each connection by itself; those at one time share the rate.
            link.shape(0.5, gbit_per_s / AT_ONCE)
            seconds = farm.drain(link.port)
            bound_s = total / (gbit_per_s * 1e9 / 8)
            figures[f"at_{gbit_per_s}_gbit_s"] = round(seconds, 2)
            figures[f"at_{gbit_per_s}_gbit_to_bytes_over_link"] = round(seconds / bound_s, 3)
    return figures


def _first_touch() -> float:
    """Bytes per second at which this machine's memory is written for the first time, as a new worker's is."""
    with mmap.mmap(-1, LEASE_BYTES) as memory:
        content = bytes(4 << 20)
        began = time.perf_counter()
        for at in range(0, LEASE_BYTES, len(content)):
            memory[at : at + len(content)] = content
        return LEASE_BYTES / (time.perf_counter() - began)


def _tls_rate(farm: _Farm) -> float:
    """Bytes per second that one core encrypts and decrypts again."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    certfile, keyfile = map(str, farm.certificate)
    client = tls.client_context().wrap_bio(back, there, server_hostname="127.0.0.1")
    server = tls.server_context(certfile, keyfile).wrap_bio(there, back, server_side=True)
    for end in (client, server, client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    piece, into = memoryview(bytes(1 << 20)), memoryview(bytearray(1 << 20))
    began = time.perf_counter()
    for _ in range(LEASE_BYTES // len(piece)):
        sent = received = 0
        while sent < len(piece):
            sent += client.write(piece[sent:])
        while received < len(piece):
            received += server.read(len(piece) - received, into[received:])  # type: ignore[operator, arg-type]
    return LEASE_BYTES / (time.perf_counter() - began)

"""A worker that ends by what it computed gets a successor on the same slices; its program goes on with new tensors."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="workers need PyTorch")

from jupyter_gpupool.core.errors import EngineError  # noqa: E402
from jupyter_gpupool.core.models import Lease, LeaseState, Request, Slice, WorkerAddress  # noqa: E402
from jupyter_gpupool.engines.local.engine import LocalEngine  # noqa: E402
from jupyter_gpupool.engines.local.exit_codes import is_replaced  # noqa: E402
from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.transport import specs  # noqa: E402
from jupyter_gpupool.transport.lifeline import Lifeline  # noqa: E402
from tests.conftest import PATIENCE_S  # noqa: E402
from tests.support import failing_gpus  # noqa: E402

SECRET = "known to the client alone"
NAME = "Tesla V100-PCIE-32GB (emulated)"
ASSERTION = "an index or an assertion of a kernel was out of bounds"


def granted(memory_mib: int = 1000) -> Lease:
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    request = Request(str(uuid.uuid4()), "somebody", memory_mib=memory_mib, secret_sha256=digest)
    return Lease(request, LeaseState.GRANTED, (Slice("GPU-x", "here", 0, NAME, memory_mib, 32510, True),))


class Told:
    """What the engine said of workers."""

    def __init__(self) -> None:
        self.ended: dict[str, tuple[LeaseState, str]] = {}
        self.replaced: list[tuple[str, WorkerAddress, str]] = []


class Running:
    """An engine in this process's event loop, and leases that this process holds."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine = engine
        self.told = Told()
        self.lines: list[Lifeline] = []
        self.lost: list[str] = []

    async def start(self, lease: Lease) -> specs.AttachSpec:
        worker = await self.engine.start_worker(lease)
        device = specs.DeviceSpec(0, "GPU-x", NAME, lease.slices[0].memory_mib, 32510, True)
        secure = bool(self.engine.certfile)
        spec = specs.AttachSpec(
            lease.id, worker.host, worker.port, SECRET, (device,), lease.ttl_s, secure=secure
        )
        self.lines.append(await asyncio.to_thread(Lifeline, spec, self.lost.append))
        return spec

    async def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s"
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: object
) -> AsyncIterator[Running]:
    for name, value in failing_gpus.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    settings = {"attach_timeout_s": 60.0, **options}  # a busy machine takes its time
    engine = LocalEngine(run_dir=str(tmp_path / "run"), emulate="always", **settings)
    found = Running(engine)
    await engine.start(lambda lease_id, state, reason: found.told.ended.update({lease_id: (state, reason)}))
    engine.on_replaced(lambda *event: found.told.replaced.append(event))
    try:
        yield found
    finally:
        session.deactivate()
        for line in found.lines:
            await asyncio.to_thread(line.release)
        await engine.stop()


def fail_at(function: str) -> str:
    """Use a GPU, let its worker fail, and go on. Returns the one exception that the program gets."""
    x = torch.ones(4, device="gpupool:0")
    weights = torch.arange(4.0)
    assert (x + 1).sum().item() == 8
    with pytest.raises(RuntimeError) as found:
        y = x * 2
        getattr(torch.special, function)(y).sum().item()
    new = weights.to("gpupool:0")
    assert (new * 2).sum().item() == 12
    with pytest.raises(RuntimeError) as lost:
        (x + 1).sum().item()
    assert "\n" not in str(lost.value) and "create it again" in str(lost.value)
    assert (new + 1).sum().item() == 10, "and what is new is not disturbed"
    return str(found.value)


@pytest.mark.parametrize(
    ("function", "reason", "secure"),
    [
        ("entr", ASSERTION, True),
        ("erfcx", "the GPU's memory has an uncorrectable error", False),
        ("bessel_j0", "another one has taken its place", True),
        ("bessel_j0", "another one has taken its place", False),
    ],
)
def test_a_program_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    certificates: Any,
    function: str,
    reason: str,
    secure: bool,
) -> None:
    files: dict[str, object] = {}
    if secure:
        files = {"certfile": str(certificates.certfile), "data_port": 0}

    async def main() -> None:
        async with running(tmp_path, monkeypatch, **files) as r:
            lease, other = granted(), granted()
            spec, others = await r.start(lease), await r.start(other)
            before = r.engine._workers.addresses()
            session.activate(spec)
            message = await asyncio.to_thread(fail_at, function)
            assert reason in message and f"special_{function}" in message and "y = x * 2" in message
            await r.until(lambda: r.told.replaced)
            ((lease_id, worker, why),) = r.told.replaced
            assert lease_id == lease.id and worker.pid != before[lease.id].pid and why
            assert worker.port == before[lease.id].port
            assert r.engine._workers.addresses() == {**before, lease.id: worker}, "nobody else is touched"
            assert not r.told.ended and not r.lost
            session.deactivate()
            session.activate(others)
            assert await asyncio.to_thread(lambda: torch.ones(3, device="gpupool:0").sum().item()) == 3
            await r.engine.stop_worker(lease.id)
            await r.until(lambda: r.told.ended)
            assert r.told.ended == {lease.id: (LeaseState.RELEASED, "ended by the pool")}

    asyncio.run(main())


def test_all_processes_of_a_lease_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import torch, sys\n"
        "x = torch.ones(3, device='cuda')\nprint(x.sum().item(), flush=True)\ninput()\n"
        "try:\n    print(x.sum().item())\n"
        "except RuntimeError as e:\n    print(e, flush=True)\n"
        "print(torch.ones(5, device='cuda').sum().item())\n"
    )

    async def main() -> None:
        async with running(tmp_path, monkeypatch) as r:
            lease = granted()
            spec = await r.start(lease)
            file = tmp_path / "lease.json"
            file.write_text(spec.to_json())
            child = subprocess.Popen(
                [sys.executable, "-c", program],
                env={**os.environ, "GPUPOOL_LEASE": str(file)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert child.stdout is not None
            assert await asyncio.to_thread(child.stdout.readline) == "3.0\n"
            session.activate(spec)
            await asyncio.to_thread(fail_at, "entr")
            said = (await asyncio.to_thread(child.communicate, "go on\n", 300))[0].splitlines()
            assert ASSERTION in said[0] and "another one has taken its place" in said[0]
            assert said[1:] == ["5.0"]

    asyncio.run(main())


def test_a_successor_has_the_slices_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def grows() -> None:
        torch.ones(300 << 18, device="gpupool:0").sum().item()

    async def main() -> None:
        async with running(tmp_path, monkeypatch) as r:
            lease = granted(memory_mib=1000)
            spec = await r.start(lease)
            await r.engine.limit_worker(lease.id, {"GPU-x": 100})
            session.activate(
                dataclasses.replace(spec, devices=(dataclasses.replace(spec.devices[0], limit_mib=2000),))
            )
            await asyncio.to_thread(fail_at, "entr")
            with pytest.raises(torch.OutOfMemoryError, match="100"):
                await asyncio.to_thread(grows)

    asyncio.run(main())


def test_where_there_is_no_successor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def keeps_failing(r: Running) -> None:
        lease = granted()
        await r.start(lease)
        while not r.told.ended:
            told = len(r.told.replaced) + len(r.told.ended)
            os.kill(r.engine._workers.addresses()[lease.id].pid, signal.SIGSEGV)
            await r.until(lambda told=told: len(r.told.replaced) + len(r.told.ended) > told)
        assert len(r.told.replaced) == 20
        assert r.told.ended == {lease.id: (LeaseState.LOST, "its worker was killed by SIGSEGV")}
        await r.until(lambda: r.lost)

    async def is_released(r: Running, may_start: asyncio.Event) -> None:
        lease = granted()
        await r.start(lease)
        may_start.clear()
        os.kill(r.engine._workers.addresses()[lease.id].pid, signal.SIGSEGV)
        await r.until(lambda: lease.id not in r.engine._workers.addresses())
        stopping = asyncio.ensure_future(r.engine.stop_worker(lease.id))
        await asyncio.sleep(0)
        may_start.set()
        await stopping
        assert r.engine._workers.addresses() == {}
        assert lease.id in r.told.ended

    async def cannot_start(r: Running) -> None:
        lease = granted()
        await r.start(lease)

        async def fails(*args: Any) -> None:
            raise EngineError("no memory")

        monkeypatch.setattr(r.engine._environments, "start_worker", fails)
        os.kill(r.engine._workers.addresses()[lease.id].pid, signal.SIGABRT)
        await r.until(lambda: lease.id in r.told.ended)
        reason = "its worker was killed by SIGABRT, and no other one could be started: no memory"
        assert r.told.ended[lease.id] == (LeaseState.LOST, reason)

    async def main() -> None:
        async with running(tmp_path, monkeypatch) as r:
            start, may_start = r.engine._environments.start_worker, asyncio.Event()
            may_start.set()

            async def starts(*args: Any) -> WorkerAddress:
                await may_start.wait()
                return await start(*args)

            monkeypatch.setattr(r.engine._environments, "start_worker", starts)
            await keeps_failing(r)
            await is_released(r, may_start)
            await cannot_start(r)

    asyncio.run(main())


def test_who_is_replaced() -> None:
    assert all(
        map(is_replaced, (specs.EXIT_KERNEL_FAILED, specs.EXIT_GPU_FAILED, -signal.SIGSEGV, -signal.SIGABRT))
    )
    others = (None, 0, 1, -signal.SIGKILL, -signal.SIGTERM, specs.EXIT_GPU_UNUSABLE, specs.EXIT_STOPPED)
    assert not any(map(is_replaced, others))

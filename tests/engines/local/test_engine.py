"""One process per lease, forked warm; how each end of it is told; and who outlives whom."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.core.models import Lease, LeaseState, Request, Slice, WorkerAddress
from jupyter_gpupool.engines.local import engine as local
from jupyter_gpupool.engines.local.engine import LocalEngine
from jupyter_gpupool.transport import specs
from jupyter_gpupool.transport.lifeline import Lifeline

pytest.importorskip("torch", reason="workers need PyTorch")

SECRET = "known to the client alone"
#: As that of tests/conftest.py, which the program below cannot import.
PATIENCE_S = 300.0


def granted(memory_mib: int = 1000, ttl_s: float = 15.0) -> Lease:
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    request = Request(str(uuid.uuid4()), "somebody", memory_mib=memory_mib, secret_sha256=digest)
    piece = Slice("GPU-x", "here", 0, "Tesla V100-PCIE-32GB (emulated)", memory_mib, 32510, True)
    return Lease(request, LeaseState.GRANTED, (piece,), ttl_s=ttl_s)


def attach_spec(lease: Lease, worker: WorkerAddress) -> specs.AttachSpec:
    piece = lease.slices[0]
    device = specs.DeviceSpec(0, piece.gpu_uuid, piece.name, piece.memory_mib, piece.total_mib, True)
    return specs.AttachSpec(lease.id, worker.host, worker.port, SECRET, (device,), lease.ttl_s)


class Ends:
    """What the engine said of workers that ended."""

    def __init__(self) -> None:
        self.said: dict[str, tuple[LeaseState, str]] = {}
        self._news = asyncio.Event()

    def __call__(self, lease_id: str, state: LeaseState, reason: str) -> None:
        self.said[lease_id] = (state, reason)
        self._news.set()

    async def of(self, lease: Lease) -> tuple[LeaseState, str]:
        while lease.id not in self.said:
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), PATIENCE_S)
        return self.said[lease.id]


@contextlib.asynccontextmanager
async def running(tmp_path: Path, **options: object) -> AsyncIterator[tuple[LocalEngine, Ends]]:
    settings = {"attach_timeout_s": 60.0, **options}  # a busy machine takes its time
    engine, ends = LocalEngine(run_dir=str(tmp_path / "run"), emulate="always", **settings), Ends()
    await engine.start(ends)
    try:
        yield engine, ends
    finally:
        await engine.stop()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_each_end_is_told_apart(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, attach_timeout_s=30.0) as (engine, ends):
            said, killed, stopped = granted(), granted(), granted()
            workers = [await engine.start_worker(lease) for lease in (said, killed, stopped)]
            lines = [Lifeline(attach_spec(lease, w)) for lease, w in zip((said, killed, stopped), workers)]
            assert len({w.pid for w in workers}) == 3
            lines[0].release()
            assert await ends.of(said) == (LeaseState.RELEASED, "released by its holder")
            os.kill(workers[1].pid, signal.SIGKILL)
            assert await ends.of(killed) == (LeaseState.LOST, "its worker was killed by SIGKILL")
            await engine.stop_worker(stopped.id)
            assert not alive(workers[2].pid)
            assert await ends.of(stopped) == (LeaseState.RELEASED, "ended by the pool")
            for line in lines[1:]:
                line.release()
            assert list((tmp_path / "run").glob("*.json*")) == [], "state files are left"

    asyncio.run(main())


def test_nobody_attaches(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, attach_timeout_s=0.3) as (engine, ends):
            lease = granted()
            await engine.start_worker(lease)
            assert await ends.of(lease) == (LeaseState.EXPIRED, "nobody attached to it")

    asyncio.run(main())


def test_stopping_the_engine_leaves_no_process(tmp_path: Path) -> None:
    async def main() -> list[int]:
        async with running(tmp_path) as (engine, _):
            workers = [await engine.start_worker(granted()) for _ in range(2)]
            assert engine._parent.process is not None
            return [engine._parent.process.pid, *(w.pid for w in workers)]

    assert not any(alive(pid) for pid in asyncio.run(main()))


def test_a_warm_parent_that_dies_is_replaced(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as (engine, ends):
            first = granted()
            worker = await engine.start_worker(first)
            assert engine._parent.process is not None
            engine._parent.process.kill()
            state, _ = await ends.of(first)
            assert state is LeaseState.LOST
            await asyncio.to_thread(_wait_gone, worker.pid)
            second = await engine.start_worker(granted())
            assert alive(second.pid)

    asyncio.run(main())


def _wait_gone(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(300)


def test_without_pytorch_the_refusal_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no such module here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def main() -> None:
        async with running(tmp_path) as (engine, _):
            for _ in range(2):  # each request tries again: it may be installed meanwhile
                with pytest.raises(EngineError, match=r"pip install 'jupyter_gpupool\[torch\]'"):
                    await engine.start_worker(granted())
                assert "PyTorch" in engine.failure and not engine.warm
                while engine._parent.control is not None:
                    await asyncio.sleep(0.01)
            parent = engine._parent.process
        assert parent is not None and not alive(parent.pid)

    asyncio.run(main())


def test_a_users_files_are_not_taken_for_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools are started from wherever somebody works, and there may be any file."""
    for name in ("types", "queue", "random", "psutil", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is a file of the user')")
    monkeypatch.chdir(tmp_path)

    async def main() -> None:
        async with running(tmp_path) as (engine, ends):
            lease = granted()
            line = Lifeline(attach_spec(lease, await engine.start_worker(lease)))
            line.release()
            assert await ends.of(lease) == (LeaseState.RELEASED, "released by its holder")

    asyncio.run(main())


def test_what_a_dead_pool_asked_for_is_not_started(tmp_path: Path) -> None:
    """Its successor counts the workers once; one that came later would compute for nobody."""

    async def main() -> None:
        engine = LocalEngine(run_dir=str(tmp_path / "run"), persistent=True)
        await engine.start(lambda *end: None)
        control = await engine._parent.until_warm()
        assert engine._parent.process is not None
        engine._parent.process.send_signal(signal.SIGSTOP)
        control.send(json.dumps({"start": asdict(engine._spec(granted())), "host": engine.host}).encode())
        await engine.stop()  # a persistent engine only hangs up
        engine._parent.process.send_signal(signal.SIGCONT)
        assert await asyncio.to_thread(engine._parent.process.wait, PATIENCE_S) == 0, "nothing to wait for"
        assert list((tmp_path / "run").glob("*.json")) == []

    asyncio.run(main())


def test_two_pools_keep_to_their_own_workers(tmp_path: Path) -> None:
    async def main() -> None:
        one = LocalEngine(pool_id="one", attach_timeout_s=60.0)
        other = LocalEngine(pool_id="other")
        for engine in (one, other):
            await engine.start(lambda *end: None)
        worker = await one.start_worker(granted())
        assert await other.adopt([]) == {}
        assert alive(worker.pid)
        for engine in (one, other):
            await engine.stop()

    asyncio.run(main())


HOST = """
import asyncio, json, sys
from jupyter_gpupool.engines.local.engine import LocalEngine
sys.path.insert(0, sys.argv[1])
from test_engine import granted
async def main():
    engine = LocalEngine(run_dir=sys.argv[2], persistent=sys.argv[3] == "True", attach_timeout_s=60.0)
    await engine.start(lambda *end: None)
    lease = granted()
    worker = await engine.start_worker(lease)
    print(json.dumps([lease.id, engine._parent.process.pid, worker.pid, worker.port, worker.created]), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.parametrize("persistent", [False, True])
def test_the_pool_is_killed(tmp_path: Path, persistent: bool, eventually: Callable) -> None:
    """An embedded pool's processes end with it; a persistent pool's workers compute on, and are found."""
    run_dir = tmp_path / "run"
    host = subprocess.Popen(
        [sys.executable, "-c", HOST, os.path.dirname(__file__), str(run_dir), str(persistent)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert host.stdout
    lease_id, parent, pid, port, created = json.loads(host.stdout.readline())
    host.kill()
    host.wait()
    host.stdout.close()
    if not persistent:
        eventually(lambda: not alive(parent) and not alive(pid), "no process is left")
        return

    async def main() -> None:
        lease = granted()
        lease = Lease(Request(lease_id, "somebody", memory_mib=1000), LeaseState.ACTIVE, lease.slices)
        async with running(tmp_path, persistent=True) as (engine, ends):
            (worker,) = (await engine.adopt([lease])).values()
            assert worker.to_json() == {"host": "127.0.0.1", "port": port, "pid": pid, "created": created}
            assert worker.environment == "default" and worker.torch, "it still says where it runs"
            os.kill(pid, signal.SIGKILL)
            assert (await ends.of(lease))[0] is LeaseState.LOST

    asyncio.run(main())


@pytest.mark.parametrize("lost", ["its state file", "its holder"])
def test_what_happened_while_no_pool_ran(tmp_path: Path, lost: str, eventually: Callable) -> None:
    """A worker without its file is found through the ledger; one that ended says how."""
    run_dir = tmp_path / "run"
    host = subprocess.Popen(
        [sys.executable, "-c", HOST, os.path.dirname(__file__), str(run_dir), "True"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert host.stdout
    lease_id, _, pid, port, created = json.loads(host.stdout.readline())
    host.kill()
    host.communicate()
    worker = WorkerAddress("127.0.0.1", port, pid, created)
    lease = Lease(Request(lease_id, "somebody", memory_mib=1000), LeaseState.ACTIVE, granted().slices, worker)
    if lost == "its state file":
        file = run_dir / f"{lease_id}.json"
        eventually(file.exists, "the worker has written it")
        file.unlink()
    else:
        Lifeline(attach_spec(lease, worker)).release()
        eventually(lambda: not alive(pid), "the worker ends")

    async def main() -> None:
        async with running(tmp_path, persistent=True) as (engine, ends):
            found = await engine.adopt([lease])
            if lost == "its state file":
                assert found == {lease_id: worker}
                await engine.stop_worker(lease_id)
                assert not alive(pid)
            else:
                assert found == {}
                assert ends.said == {lease_id: (LeaseState.RELEASED, "released by its holder")}

    asyncio.run(main())


def test_a_worker_that_nobody_knows_is_ended(tmp_path: Path, eventually: Callable) -> None:
    host = subprocess.Popen(
        [sys.executable, "-c", HOST, os.path.dirname(__file__), str(tmp_path / "run"), "True"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert host.stdout
    _, _, pid, _, _ = json.loads(host.stdout.readline())
    host.kill()
    host.wait()
    host.stdout.close()

    async def main() -> None:
        async with running(tmp_path, persistent=True) as (engine, _):
            assert await engine.adopt([]) == {}

    asyncio.run(main())
    eventually(lambda: not alive(pid), "the worker is ended")


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (None, LeaseState.LOST),
        (-9, LeaseState.LOST),
        (-40, LeaseState.LOST),
        (-100000, LeaseState.LOST),
        (1, LeaseState.LOST),
        (specs.EXIT_FENCED, LeaseState.EXPIRED),
    ],
)
def test_what_an_exit_code_means(code: int | None, state: LeaseState) -> None:
    assert local.end_of(code)[0] is state


def test_a_worker_hears_that_it_is_to_end_at_any_moment_of_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leases that are released as soon as they are granted must not wait for a kill."""
    monkeypatch.setattr("jupyter_gpupool.engines.local.workers._GRACE_S", 60.0)  # time for a busy machine

    async def main() -> None:
        async with running(tmp_path) as (engine, ends):
            for step in range(80):
                lease = granted()
                await engine.start_worker(lease)
                await asyncio.sleep(step / 10_000)  # another moment each time
                await asyncio.gather(*(engine.stop_worker(lease.id) for _ in range(3)))
                assert "SIGKILL" not in (await ends.of(lease))[1]

    asyncio.run(main())

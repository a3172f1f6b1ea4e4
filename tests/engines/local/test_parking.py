"""The engine parks a worker that runs: its memory goes to the arena and comes back, and its program does not notice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="workers need PyTorch")

from torch import nn  # noqa: E402

from jupyter_gpupool.core.engine import ParkingEngine, WorkerState  # noqa: E402
from jupyter_gpupool.core.errors import EngineError  # noqa: E402
from jupyter_gpupool.core.models import Lease  # noqa: E402
from jupyter_gpupool.engines.local.arena import Arena  # noqa: E402
from jupyter_gpupool.engines.local.arena_account import ArenaAccount, ArenaFull  # noqa: E402
from jupyter_gpupool.engines.local.engine import LocalEngine  # noqa: E402
from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.transport.lifeline import Lifeline  # noqa: E402

from ...conftest import PATIENCE_S, often  # noqa: E402
from ...support.cutting_proxy import CuttingProxy  # noqa: E402
from .test_engine import attach_spec, granted  # noqa: E402


class Server:
    """An engine in a thread of its own, so that a program can run in this one."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        patience = {"attach_timeout_s": PATIENCE_S, "start_timeout_s": PATIENCE_S}
        self.engine = LocalEngine(run_dir=str(folder), emulate="always", **patience, **options)
        self.ended: list[str] = []
        self.woken: list[str] = []
        self.engine.on_wake(self.woken.append)
        self.do(self.engine.start(lambda lease_id, state, reason: self.ended.append(lease_id)))

    def do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def start(self, lease: Lease) -> Any:
        return self.do(self.engine.start_worker(lease))

    def stop(self) -> None:
        self.do(self.engine.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "run", park_memory_mib=64, clean_after_s=0.0)
    yield server
    server.stop()


@pytest.fixture
def server(one_server: Server, eventually: Callable[..., Any]) -> Iterator[Server]:
    yield one_server
    for lease_id in list(one_server.engine._workers.addresses()):
        one_server.do(one_server.engine.stop_worker(lease_id))
    arena = one_server.engine._parking.arena
    eventually(lambda: arena.free_mib == 64, "all chunks are free again")
    one_server.woken.clear()


@pytest.fixture
def lease(server: Server) -> Iterator[Lease]:
    """A lease of 100 MiB that this process is attached to."""
    lease = granted(memory_mib=100)
    spec = attach_spec(lease, server.start(lease))
    line = Lifeline(spec)
    session.activate(spec)
    yield lease
    session.deactivate()
    line.release()


def elsewhere(lease: Lease, uuid: str) -> Lease:
    return replace(lease, slices=tuple(replace(s, gpu_uuid=uuid) for s in lease.slices))


def training(steps: int, between: Callable[[], object] = lambda: None) -> list[Any]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Dropout(0.2), nn.Linear(30, 1)).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        between()
        optimizer.zero_grad()
        loss = model(torch.randn(16, 20, device="cuda")).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [losses, *(t.cpu() for t in model.state_dict().values())]


def trains_alike_beside(
    disturb: Callable[[], None], over: threading.Event, between: Callable[[], object], undisturbed: list[Any]
) -> None:
    """Train as before, while another thread disturbs until ``over`` is set: the numbers are the same to the bit."""
    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    try:
        disturbed = training(len(undisturbed[0]), between)
    finally:
        over.set()
        disturbing.join()
    assert disturbed[0] == undisturbed[0]
    assert all(map(torch.equal, disturbed[1:], undisturbed[1:]))


@pytest.mark.soak
def test_a_program_gets_the_same_numbers_while_it_is_parked_all_the_time(
    server: Server, lease: Lease, eventually: Callable[..., Any]
) -> None:
    steps = often(12, 200)
    undisturbed = training(steps)
    over, parks = threading.Event(), 0

    def park_and_wake() -> None:
        nonlocal parks
        while not over.is_set():
            with contextlib.suppress(EngineError):  # it was inside of something long
                server.do(server.engine.park_worker(lease))
                parks += 1
            server.do(server.engine.resume_worker(elsewhere(lease, f"GPU-{parks % 3}")))

    def until_parked_again() -> None:
        before = parks
        eventually(lambda: parks > before, "another park")

    trains_alike_beside(park_and_wake, over, until_parked_again, undisturbed)
    assert parks >= steps


def test_a_connection_that_is_lost_while_its_lease_is_parked_is_made_again(
    server: Server, eventually: Callable[..., Any]
) -> None:
    lease = granted(memory_mib=100)
    spec = attach_spec(lease, server.start(lease))
    line = Lifeline(spec)
    with CuttingProxy((spec.host, spec.port)) as proxy:
        session.activate(replace(spec, port=proxy.port))
        try:
            x = torch.arange(1000.0, device="cuda")
            torch.cuda.synchronize()
            for k in range(3):
                server.woken.clear()
                server.do(server.engine.park_worker(lease))
                found: list[Any] = []
                asking = threading.Thread(target=lambda: found.append(x.add_(1).cpu()))  # noqa: B023
                asking.start()
                eventually(lambda: server.woken, "it is asked to wake")
                proxy.cut_all()
                server.do(server.engine.resume_worker(lease))
                asking.join()
                assert torch.equal(found[0], torch.arange(1000.0) + k + 1)
        finally:
            session.deactivate()
            line.release()


def test_a_parked_lease_wakes_when_an_operator_needs_it(
    server: Server, lease: Lease, eventually: Callable[..., Any]
) -> None:
    x = torch.arange(1 << 20, device="cuda", dtype=torch.float32)
    before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    assert server.do(server.engine.park_worker(lease)) >= 4
    assert server.engine.parked() == {lease.id}
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.is_available()
    torch.cuda.synchronize()
    assert (x.shape, x.device.type, server.woken) == ((1 << 20,), "cuda", [])
    found: list[float] = []
    asking = threading.Thread(target=lambda: found.append(x[-1].item()))
    asking.start()
    eventually(lambda: server.woken, "the engine is asked to wake it")
    assert set(server.woken) == {lease.id}
    server.do(server.engine.resume_worker(lease))
    asking.join()
    assert found == [(1 << 20) - 1]
    assert server.engine.parked() == set()


def test_a_wake_during_the_park_is_not_lost(
    server: Server, lease: Lease, eventually: Callable[..., Any]
) -> None:
    x = torch.ones(1 << 20, device="cuda")
    torch.cuda.synchronize()
    parking = server.engine._parking
    server.do(server.engine.park_worker(lease))
    asking = threading.Thread(target=x.tolist)
    asking.start()
    eventually(lambda: server.woken, "somebody waits for it")
    # As a pool that has not committed the park yet, and so takes the first one for a mistake.
    server.woken.clear()
    eventually(lambda: server.woken, "it is reminded")
    server.do(server.engine.resume_worker(lease))
    asking.join()
    assert parking._wanted == set()


def test_an_idle_lease_is_copied_before_anybody_takes_it(
    server: Server, lease: Lease, eventually: Callable[..., Any]
) -> None:
    x = torch.ones(1 << 20, device="cuda")
    torch.cuda.synchronize()
    parking = server.engine._parking
    server.do(parking.clean_if_idle(lease.id))
    assert parking.clean == {lease.id}
    eventually(
        lambda: server.engine.states().get(lease.id) == WorkerState(4, is_clean=True), "its usage is read"
    )
    x.add_(1)
    torch.cuda.synchronize()
    server.do(parking.park(lease.id))
    server.do(server.engine.resume_worker(lease))
    assert x.sum().item() == 2 << 20


def test_clean_copies_make_room_for_who_is_parked(server: Server, lease: Lease) -> None:
    tensors = [torch.full((1 << 20,), float(k), device="cuda") for k in range(9)]
    torch.cuda.synchronize()
    parking = server.engine._parking
    server.do(parking.clean_if_idle(lease.id))
    other = granted(memory_mib=100)
    server.start(other)
    parking.arena.lend("a third", parking.arena.free_mib)
    assert server.do(server.engine.park_worker(other)) > 0
    assert parking.clean == set()
    assert [t[0].item() for t in tensors] == list(range(9))

    async def release() -> None:
        await parking.arena.release("a third")

    server.do(release())


def test_without_room_the_program_goes_on(server: Server, lease: Lease) -> None:
    x = torch.ones(20 << 20, device="cuda")
    torch.cuda.synchronize()
    with pytest.raises(
        EngineError, match="MiB of host memory are needed to park lease .*, and only 64 of 64"
    ):
        server.do(server.engine.park_worker(lease))
    assert x.sum().item() == 20 << 20


def test_a_lease_that_ends_gives_its_part_of_the_arena_back(
    server: Server, lease: Lease, eventually: Callable[..., Any]
) -> None:
    x = torch.ones(1 << 20, device="cuda")
    torch.cuda.synchronize()
    server.do(server.engine.park_worker(lease))
    arena = server.engine._parking.arena
    assert arena.free_mib < 64
    server.do(server.engine.stop_worker(lease.id))
    eventually(lambda: arena.free_mib == 64, "its chunks are free again")
    assert server.engine.parked() == set()
    for descriptor in arena.lend("the next one", 64):
        assert not any(os.pread(descriptor, 4 << 20, 0)), "nothing of it is left"
    assert x.shape == (1 << 20,)

    async def release() -> None:
        await arena.release("the next one")

    server.do(release())


def test_a_worker_that_is_killed_while_it_is_parked_leaves_nothing(
    server: Server, lease: Lease, eventually: Callable[..., Any]
) -> None:
    x = torch.ones(1 << 20, device="cuda")
    torch.cuda.synchronize()
    server.do(server.engine.park_worker(lease))
    os.kill(server.engine._workers.addresses()[lease.id].pid, signal.SIGKILL)
    eventually(lambda: lease.id in server.ended, "the pool learns of its end")
    assert server.engine.parked() == set()
    with pytest.raises(EngineError, match="the worker of lease .* cannot be asked"):
        server.do(server.engine.resume_worker(lease))
    assert not list(Path(server.engine.run_dir).glob(f"{lease.id}*"))
    assert x.shape == (1 << 20,)


def test_a_pool_that_starts_again_finds_what_is_parked(tmp_path: Path) -> None:
    first = Server(tmp_path / "run", park_memory_mib=32, persistent=True)
    lease = granted(memory_mib=100)
    worker = first.start(lease)
    spec = attach_spec(lease, worker)
    line = Lifeline(spec)
    session.activate(spec)
    try:
        x = torch.arange(5.0, device="cuda")
        torch.cuda.synchronize()
        first.do(first.engine.park_worker(lease))
        first.stop()
        asking = threading.Thread(target=x.tolist)
        asking.start()
        second = Server(tmp_path / "run", park_memory_mib=32, persistent=True)
        try:
            second.do(second.engine.adopt([replace(lease, worker=worker)]))
            assert second.engine.parked() == {lease.id}
            while not second.woken:
                second.do(asyncio.sleep(0.01))
            second.do(second.engine.resume_worker(lease))
            asking.join()
            assert x.tolist() == [0, 1, 2, 3, 4]
            second.do(second.engine.park_worker(lease))
            second.do(second.engine.resume_worker(lease))
            assert x.tolist() == [0, 1, 2, 3, 4]
        finally:
            session.deactivate()
            line.release()
            second.do(second.engine.stop_worker(lease.id))
            second.stop()
    finally:
        session.deactivate()


def test_an_engine_without_an_arena_parks_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path / "run")
    assert isinstance(server.engine, ParkingEngine)
    try:
        lease = granted()
        server.start(lease)
        assert server.engine.arenas() == {}
        with pytest.raises(EngineError, match="set park_memory_mib"):
            server.do(server.engine.park_worker(lease))
    finally:
        server.stop()


def test_memory_that_cannot_be_reserved_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    engine = LocalEngine(run_dir=str(tmp_path / "run"), emulate="always", park_memory_mib=8)
    with pytest.raises(EngineError, match="park_memory_mib=8: that much host memory cannot be reserved"):
        asyncio.run(engine.start(lambda *_: None))


def test_what_was_lent_once_is_replaced() -> None:
    async def main() -> None:
        arena = Arena(8, None)
        await arena.reserve()
        lent = arena.lend("one", 8)
        kept = os.dup(lent[0])
        await arena.release("one")
        (again, *_) = arena.lend("two", 8)
        os.pwrite(again, b"of the second", 0)
        assert not any(os.pread(kept, 4096, 0)), "the first one does not see it"
        os.close(kept)
        await arena.close()

    asyncio.run(main())


@given(st.lists(st.tuples(st.sampled_from("lrz"), st.sampled_from("abc"), st.integers(0, 5)), max_size=50))
def test_no_chunk_is_lent_twice(steps: list[tuple[str, str, int]]) -> None:
    account, cleaning = ArenaAccount(), []
    for chunk in range(8):
        account.add(chunk)
    for what, who, count in steps:
        if what == "l":
            free = account.free
            try:
                assert len(account.lend(who, count)) == count
            except ArenaFull as e:
                assert e.missing == count - free
        elif what == "r":
            cleaning += account.release(who)
        elif cleaning:
            account.add(cleaning.pop())
        lent = [chunk for who in "abc" for chunk in account.lent(who)]
        assert len(set(lent)) == len(lent)
        assert account.total == 8
        assert account.free + len(lent) + len(cleaning) == 8

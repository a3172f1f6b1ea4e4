"""One user's idle lease is parked for another's request, and wakes when its program goes on: all in one real pool."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="workers need PyTorch")

from jupyter_gpupool.core.errors import NoCapacity  # noqa: E402
from jupyter_gpupool.core.models import Lease, LeaseState  # noqa: E402
from jupyter_gpupool.pytorch.client import session  # noqa: E402

from .conftest import Pool, ask, attach_spec  # noqa: E402
from .test_restarts import free_port  # noqa: E402

RECLAIM = (
    "--PoolService.reclaim=idle",
    "--PoolService.reclaim_after_s=0",
    "--PoolService.min_resident_s=0",
    "--LocalEngine.park_memory_mib=64",
)


class Program:
    """A program in this process that holds all GPUs and has a tensor there."""

    def __init__(self, pool: Pool) -> None:
        self.lease, self._line = pool.hold(ask(1.0, 2))
        session.activate(attach_spec(self.lease))
        self.tensor = torch.arange(1000.0, device="cuda:1")
        self.tensor += 1
        assert self.tensor.sum().item() == 500500.0
        self.answers: list[float] = []

    def compute(self) -> threading.Thread:
        def work() -> None:
            self.tensor += 1
            self.answers.append(self.tensor.sum().item())

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def end(self) -> None:
        session.deactivate()
        self._line.release()


@pytest.fixture
def program(start_pool: Callable[..., Pool]) -> Iterator[tuple[Pool, Program]]:
    pool = start_pool(*RECLAIM)
    program = Program(pool)
    yield pool, program
    program.end()


def parked(pool: Pool, lease: Lease) -> bool:
    return pool.client.lease(lease.id).state is LeaseState.PARKED


def test_an_idle_lease_makes_room_and_wakes_where_it_was(
    program: tuple[Pool, Program], eventually: Callable[..., Any]
) -> None:
    pool, mine = program
    other, line = pool.hold(ask(1.0, 2))
    assert other.state is LeaseState.ACTIVE
    asleep = pool.client.lease(mine.lease.id)
    assert asleep.state is LeaseState.PARKED and asleep.parked is not None and asleep.parked.memory_mib > 0
    assert asleep.position is None, "it needs no GPUs"
    assert sum(pool.granted_mib()) == sum(piece.memory_mib for piece in other.slices)
    with pytest.raises(NoCapacity, match="is parked"):
        pool.client.resize(mine.lease.id, 0.5)

    # The other one computes all the time, so that it is not parked in turn.
    line.release()
    eventually(lambda: pool.client.lease(other.id).state.ended, "the other lease is over")
    assert parked(pool, mine.lease), "nobody needs it"
    mine.compute().join(300)
    assert mine.answers == [501500.0]
    awake = pool.client.lease(mine.lease.id)
    assert awake.state is LeaseState.ACTIVE and awake.slices == mine.lease.slices and awake.parked is None


def test_two_programs_take_turns_and_nothing_is_lost(
    program: tuple[Pool, Program], eventually: Callable[..., Any]
) -> None:
    pool, mine = program
    other, line = pool.hold(ask(1.0, 2))
    assert parked(pool, mine.lease)
    # The other one is idle, too, so it is parked for the program that goes on.
    mine.compute().join(300)
    assert mine.answers == [501500.0]
    eventually(lambda: parked(pool, other), "the idle one made room")
    line.release()
    eventually(
        lambda: pool.client.lease(other.id).state is LeaseState.RELEASED, "parked ones end as others do"
    )


def test_a_parked_lease_outlives_its_pool(
    start_pool: Callable[..., Pool], eventually: Callable[..., Any]
) -> None:
    port = free_port()
    options = (*RECLAIM, "--persistent")
    pool = start_pool(*options, port=port)
    mine = Program(pool)
    try:
        other, line = pool.hold(ask(1.0, 2))
        assert parked(pool, mine.lease)
        pool.process.kill()
        pool.process.wait()
        pool = start_pool(*options, port=port)
        assert parked(pool, mine.lease)
        line.release()
        eventually(lambda: pool.client.lease(other.id).state.ended, "the other lease is over")
        mine.compute().join(300)
        assert mine.answers == [501500.0]
    finally:
        mine.end()
    eventually(lambda: sum(pool.granted_mib()) == 0, "every share comes back")

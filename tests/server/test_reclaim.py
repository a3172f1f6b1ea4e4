"""One user's idle lease is parked for another's request, and wakes when its program goes on: all in one real pool."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="workers need PyTorch")

import jupyter_gpupool  # noqa: E402
from jupyter_gpupool.core.errors import NoCapacity  # noqa: E402
from jupyter_gpupool.core.models import Lease, LeaseState  # noqa: E402
from jupyter_gpupool.pytorch.client import session  # noqa: E402

from ..support.ports import free_port  # noqa: E402
from .conftest import Pool, ask, attach_spec  # noqa: E402

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


def test_a_program_that_waits_shows_its_place_and_can_be_interrupted(
    start_pool: Callable[..., Pool], eventually: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    # Only leases of the namespace "default" may be parked, so that the other one keeps its GPUs.
    pool = start_pool(*RECLAIM[1:], "--PoolService.ttl_s=15")
    pool.client.change_namespace("default", {"reclaim": "idle"})
    pool.client.create_namespace("busy", {})
    with jupyter_gpupool.attach(2, 1.0) as mine:
        x = torch.arange(4.0, device="cuda:1") + 1
        assert x.sum().item() == 10.0
        request = ask(1.0, 2, namespace="busy")
        other, line = pool.hold(request)
        over = threading.Event()

        def beat_and_interrupt() -> None:
            interrupted = False
            while not over.wait(0.2):
                pool.client.heartbeat(other.id)
                if not interrupted and "position 1 in the queue" in capsys.readouterr().err:
                    interrupted = True
                    signal.raise_signal(signal.SIGINT)

        thread = threading.Thread(target=beat_and_interrupt, daemon=True)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            (x + 1).sum().item()
        assert pool.client.lease(mine.id).position == 1, "it waits still, for what was sent already"
        over.set()
        thread.join()
        line.release()
        assert (x + 1).sum().item() == 14.0
        assert mine.state is LeaseState.ACTIVE

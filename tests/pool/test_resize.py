"""Another share of the same GPUs: nothing is granted twice, and who waits gets what is freed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from jupyter_gpupool.core.errors import (
    ImpossibleRequest,
    InvalidRequest,
    LeaseEnded,
    NoCapacity,
    UnknownLease,
)
from jupyter_gpupool.core.models import Lease, LeaseState, Request, StartWorker, WorkerAddress
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager

Ask = Callable[..., Request]


@pytest.fixture
def active(manager: Manager, ask: Ask, worker: WorkerAddress) -> Callable[..., Lease]:
    def start(**wish: Any) -> Lease:
        request = ask(**wish)
        manager.request(request)
        lease = manager.worker_started(request.id, worker).lease
        assert lease is not None
        return lease

    return start


def used(manager: Manager) -> list[int]:
    return list(manager.snapshot().granted_mib.values())


def test_larger_and_smaller_and_who_waits_gets_the_rest(
    manager: Manager, active: Callable[..., Lease], ask: Ask, ledger: Ledger, servers: Any
) -> None:
    lease = active(num_gpus=2, partial=0.5)
    assert manager.resize(lease.id, 0.8, None, "ada").lease is not None
    assert used(manager) == [26008, 26008]
    waiting = ask(num_gpus=2, partial=0.5)
    manager.request(waiting)
    change = manager.resize(lease.id, None, 1000)
    assert change.lease is not None and [piece.memory_mib for piece in change.lease.slices] == [1000, 1000]
    assert [a.lease.id for a in change.actions if isinstance(a, StartWorker)] == [waiting.id]
    assert used(manager) == [17255, 17255]
    again = Manager(ledger)
    again.set_servers(servers)
    assert again.lease(lease.id).slices == change.lease.slices, "it is in the ledger"
    manager.release(lease.id)
    assert used(manager) == [16255, 16255], "what it has is freed, not what it once had"


def test_without_room_it_stays_as_it_is(manager: Manager, active: Callable[..., Lease]) -> None:
    on_one = {"index": "0"}
    lease = active(partial=0.3, filters=on_one)
    active(partial=0.5, filters=on_one)
    with pytest.raises(NoCapacity, match="6502 MiB free: the slice of 9753 MiB there can grow to 16255 MiB"):
        manager.resize(lease.id, 0.8, None)
    assert used(manager) == [9753 + 16255, 0]
    assert manager.lease(lease.id).state is LeaseState.ACTIVE


@pytest.mark.parametrize(
    ("partial", "mib", "error"),
    [
        (None, None, InvalidRequest),
        (0.5, 100, InvalidRequest),
        (1.5, None, InvalidRequest),
        (float("nan"), None, InvalidRequest),
        (True, None, InvalidRequest),
        (None, 0, InvalidRequest),
        (None, 32511, ImpossibleRequest),
        (1e-9, None, ImpossibleRequest),
    ],
)
def test_senseless_sizes(
    manager: Manager, active: Callable[..., Lease], partial: Any, mib: Any, error: type[Exception]
) -> None:
    lease = active(partial=0.3)
    with pytest.raises(error) as refused:
        manager.resize(lease.id, partial, mib)
    assert "\n" not in str(refused.value)
    assert used(manager) == [9753, 0]


def test_only_a_lease_of_ones_own_that_is_attached(
    manager: Manager, active: Callable[..., Lease], ask: Ask
) -> None:
    lease = active(partial=0.3)
    with pytest.raises(UnknownLease):
        manager.resize(lease.id, 0.1, None, "eve")
    starting = ask(partial=0.1)
    manager.request(starting)
    with pytest.raises(NoCapacity, match="no slices yet"):
        manager.resize(starting.id, 0.2, None)
    manager.release(lease.id)
    with pytest.raises(LeaseEnded):
        manager.resize(lease.id, 0.1, None)

"""Servers on which nothing new is placed, and GPUs that others hold a part of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from jupyter_gpupool.core.errors import ImpossibleRequest, NoCapacity, UnknownServer
from jupyter_gpupool.core.models import LeaseState, Request, Server, StartWorker
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager

Ask = Callable[..., Request]

TWO = [Server(name, "127.0.0.1", emulated_gpus(name, count=1, memory_mib=1000)) for name in ("one", "two")]


@pytest.fixture
def servers() -> list[Server]:
    return TWO


def test_nothing_new_is_placed_on_a_drained_server(manager: Manager, ask: Ask) -> None:
    held = manager.request(ask(filters={"server": "one"}, partial=0.5)).lease
    assert held is not None
    manager.drain("one")
    on_two = manager.request(ask()).lease
    assert on_two is not None and on_two.slices[0].server == "two", "best fit would be the half that is left"
    waiting = ask(partial=0.1)
    assert manager.request(waiting).actions == ()
    assert manager.lease(held.id).state is LeaseState.GRANTED, "what there is stays"
    with pytest.raises(ImpossibleRequest, match="one, where an administrator"):
        manager.request(ask(num_gpus=2))
    started = [a.lease.id for a in manager.drain("one", False).actions if isinstance(a, StartWorker)]
    assert started == [waiting.id]


def test_the_ledger_remembers_and_so_does_a_server_that_comes_back(
    manager: Manager, ledger: Ledger, ask: Ask, clock: Callable[[], float]
) -> None:
    manager.drain("two")
    manager.drain("two")
    again = Manager(ledger, clock)
    assert [s.draining for s in again.snapshot().servers] == []
    again.set_servers(TWO[:1])
    again.set_servers(TWO)
    assert [s.draining for s in again.snapshot().servers] == [False, True]
    again.set_servers(TWO[:1])
    again.drain("two", False)  # although it is away
    again.set_servers(TWO)
    assert not any(s.draining for s in again.snapshot().servers)
    with pytest.raises(UnknownServer, match="gpupool gpus"):
        again.drain("three")


def test_with_every_server_drained_the_refusal_says_so(manager: Manager, ask: Ask) -> None:
    manager.drain("one")
    manager.drain("two")
    with pytest.raises(ImpossibleRequest, match="no GPUs but those of one, two"):
        manager.request(ask())


def test_what_others_hold_is_not_granted(manager: Manager, ask: Ask) -> None:
    gpu = TWO[0].gpus[0]
    manager.set_servers([replace(TWO[0], gpus=(replace(gpu, taken_mib=600),))])
    with pytest.raises(NoCapacity):
        manager.request(ask(memory_mib=401, wait=False))
    lease = manager.request(ask(memory_mib=400)).lease
    assert lease is not None and lease.state is LeaseState.GRANTED
    waiting = ask(memory_mib=500)
    assert manager.request(waiting).actions == ()
    back = manager.set_servers([replace(TWO[0], gpus=(gpu,))])
    assert [a.lease.id for a in back.actions if isinstance(a, StartWorker)] == [waiting.id]

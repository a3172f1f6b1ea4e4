"""Many changes in one commit, and the view that they are decided on: never other than the ledger."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event

from jupyter_gpupool.core.errors import ImpossibleRequest, LedgerUnavailable, NoCapacity, PoolError
from jupyter_gpupool.core.models import LeaseState, Request, Server, WorkerAddress
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.ledger.tables import gpus
from jupyter_gpupool.pool.manager import Manager

Ask = Callable[..., Request]


def test_a_refusal_undoes_its_own_change_only(ledger: Ledger, manager: Manager, ask: Ask) -> None:
    first, second, third = ask(partial=0.7), ask(num_gpus=2, partial=0.6, wait=False), ask(partial=0.3)
    with ledger.together():
        manager.request(first)
        with pytest.raises(NoCapacity):
            manager.request(second)
        with pytest.raises(ImpossibleRequest):
            manager.request(ask(num_gpus=3))
        manager.request(third)
        manager.release(first.id)
        assert manager.forecast(ask(num_gpus=2, partial=0.7)).state is LeaseState.GRANTED
    states = {lease.id: lease.state for lease in manager.leases(include_ended=True)}
    assert states == {first.id: LeaseState.RELEASED, third.id: LeaseState.GRANTED}
    assert ledger.verify() == ""


def test_nothing_is_there_before_the_commit(db_url: str, ledger: Ledger, manager: Manager, ask: Ask) -> None:
    if ledger.path is None:
        other = Ledger(db_url)
    else:
        other = Ledger(db_url)
    with ledger.together():
        lease = manager.request(ask(partial=0.5)).lease
        assert lease is not None and lease.state is LeaseState.GRANTED
        with other.reading() as tx:
            assert tx.lease(lease.id) is None
    with other.reading() as tx:
        assert tx.lease(lease.id) is not None
    other.close()


def test_when_the_database_refuses_nothing_has_happened(
    ledger: Ledger, manager: Manager, servers: list[Server], ask: Ask
) -> None:
    held = manager.request(ask(partial=0.5)).lease
    assert held is not None
    before = manager.snapshot()
    with pytest.raises(LedgerUnavailable), ledger.together():
        manager.request(ask(partial=0.2))
        manager.release(held.id)
        with ledger.transaction() as tx:  # what placement would never do
            card = servers[0].gpus[0]
            tx.execute(gpus.update().where(gpus.c.uuid == card.uuid).values(used_mib=card.memory_mib + 1))
    assert manager.snapshot() == before
    assert ledger.verify() == ""
    assert manager.request(ask(partial=0.5)).lease is not None


def test_what_somebody_else_writes_is_seen(db_url: str, ledger: Ledger, manager: Manager, ask: Ask) -> None:
    lease = manager.request(ask(partial=0.5)).lease
    assert lease is not None
    other = Ledger(db_url)
    Manager(other).release(lease.id)
    assert manager.lease(lease.id).state is LeaseState.RELEASED
    assert manager.request(ask(num_gpus=2, partial=1.0, wait=False)).lease is not None, "all of it is free"
    assert ledger.verify() == ""
    other.close()


def test_what_lives_is_read_once_and_again_only_after_somebody_else_has_written(
    db_url: str, ledger: Ledger, manager: Manager, ask: Ask
) -> None:
    lease = manager.request(ask(partial=0.5)).lease
    assert lease is not None
    asked: list[str] = []
    event.listen(
        ledger._engine,
        "before_cursor_execute",
        lambda conn, cursor, statement, *rest: asked.append(statement),
    )
    manager.tick()  # forgets old leases, too: the view has to be read again
    assert [one.id for one in manager.leases()] == [lease.id]
    asked.clear()
    assert [one.id for one in manager.snapshot().leases] == [lease.id]
    manager.tick()
    assert [statement for statement in asked if "slices" in statement] == []
    other = Ledger(db_url)
    Manager(other).release(lease.id)
    assert manager.snapshot().leases == () and manager.leases() == []
    assert ledger.verify() == ""
    other.close()


def test_the_view_is_the_ledger_whatever_happens(
    ledger: Ledger, manager: Manager, worker: WorkerAddress, ask: Ask, clock: Any
) -> None:
    chance = random.Random(11)
    done = 0
    for _ in range(60):
        try:
            with ledger.together():
                for _ in range(chance.randint(1, 12)):
                    live = manager.leases()
                    try:
                        some = chance.choice(live) if live else None
                        what = chance.randint(0, 6)
                        if some is None or what < 3:
                            manager.request(
                                ask(
                                    partial=chance.choice([0.2, 0.5, 0.9]),
                                    num_gpus=chance.choice([1, 2, 3]),
                                    wait=chance.random() < 0.5,
                                )
                            )
                        elif what == 3:
                            manager.worker_started(some.id, worker)
                        elif what == 4:
                            manager.resize(some.id, chance.choice([0.1, 0.4]), None)
                        elif what == 5:
                            manager.release(some.id)
                        else:
                            manager.worker_exited(some.id, LeaseState.LOST, "died")
                        done += 1
                    except PoolError as error:
                        if error.status >= 500:
                            raise
                if chance.random() < 0.15:
                    raise RuntimeError("before the commit")
        except RuntimeError:
            pass
        assert ledger.verify() == ""
    assert done > 150


def test_many_new_ids_are_looked_for_at_once(ledger: Ledger, manager: Manager, ask: Ask) -> None:
    over, held = ask(partial=0.1), ask(partial=0.1)
    manager.request(over)
    manager.release(over.id)
    manager.request(held)
    fresh = [ask(partial=0.1) for _ in range(5)]
    asked: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    event.listen(ledger._engine, "before_cursor_execute", note)
    with ledger.together([request.id for request in (over, held, *fresh)]):
        known = [manager.request(request).lease for request in (over, held)]
        new = [manager.request(request).lease for request in fresh]
        manager.release(fresh[0].id)
        assert manager.leases(include_ended=True, newest=1), "which tells the database"
        repeated = manager.request(fresh[0]).lease
    event.remove(ledger._engine, "before_cursor_execute", note)
    assert [lease and lease.state for lease in known] == [LeaseState.RELEASED, LeaseState.GRANTED]
    assert {lease and lease.state for lease in new} == {LeaseState.GRANTED}
    assert repeated is not None and repeated.state is LeaseState.RELEASED
    lookups = [s for s in asked if "FROM leases" in s and "leases.id" in s.partition("WHERE")[2]]
    assert len(lookups) == 3, "all of them once, then the two that have ended"
    assert ledger.verify() == ""

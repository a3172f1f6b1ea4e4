"""What a ledger does on both databases, and what is PostgreSQL's own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from jupyter_gpupool.core.errors import LedgerUnavailable, NotLeading
from jupyter_gpupool.core.models import Lease, LeaseState, Request, Server, Slice
from jupyter_gpupool.pool.ledger import tables
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager

Ask = Callable[..., Request]


def test_the_database_itself_refuses_what_exceeds_a_gpu(
    ledger: Ledger, servers: list[Server], ask: Ask
) -> None:
    """Whatever placement may decide one day."""
    card = servers[0].gpus[0]
    whole = Slice(card.uuid, card.server, card.index, card.name, card.memory_mib, card.memory_mib)
    first, second = ask(), ask()
    with ledger.transaction() as tx:
        tx.record_gpus(servers)
        for request in (first, second):
            tx.add(Lease(request, LeaseState.QUEUED))
        tx.grant(first.id, [whole], at=1.0)
    with pytest.raises(LedgerUnavailable), ledger.transaction() as tx:
        tx.grant(second.id, [whole], at=2.0)
    with pytest.raises(LedgerUnavailable), ledger.transaction() as tx:
        tx.grant(first.id, [whole], at=2.0)
    with ledger.reading() as tx:
        assert tx.granted_mib()[card.uuid] == card.memory_mib
        after = tx.lease(second.id)
    assert after is not None and after.state is LeaseState.QUEUED and after.slices == ()


def test_everything_about_a_lease_survives(db_url: str, ledger: Ledger, ask: Ask) -> None:
    request = ask(
        num_gpus=2,
        partial=0.1 + 0.2,
        filters={"name": "V100"},
        namespace="n",
        wait=False,
        label="läbel",
        client="c",
    )
    with ledger.transaction() as tx:
        tx.add(Lease(request, LeaseState.QUEUED, created_at=1.25, ttl_s=3.5))
    ledger.close()
    other = Ledger(db_url)
    with other.reading() as tx:
        assert tx.lease(request.id) == Lease(
            request, LeaseState.QUEUED, created_at=1.25, heartbeat_at=1.25, ttl_s=3.5
        )
    other.close()


def test_the_steps_lead_to_the_tables_that_the_code_knows(ledger: Ledger) -> None:
    with ledger.reading() as tx:
        context = MigrationContext.configure(tx._connection, opts={"compare_server_default": False})
        assert compare_metadata(context, tables.metadata) == []


@pytest.fixture
def shared_url(postgresql: Any) -> Any:
    with postgresql.database("ready") as url:
        yield url


def test_two_open_an_empty_database_at_once(postgresql: Any) -> None:
    with postgresql.database() as url:
        start, failures = threading.Barrier(3), []

        def open_it() -> None:
            start.wait()
            try:
                Ledger(url).close()
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=open_it) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert postgresql.sql("SELECT version FROM gpupool_schema", url.split("/")[3].split("?")[0]) == [
            (tables.SCHEMA_VERSION,)
        ]


def test_a_newer_format_is_refused(shared_url: str, postgresql: Any) -> None:
    name = shared_url.split("/")[3].split("?")[0]
    postgresql.sql("UPDATE gpupool_schema SET version = 99", name)
    with pytest.raises(LedgerUnavailable, match="newer version .its format is 99"):
        Ledger(shared_url)


def test_a_commit_is_on_the_disk_whatever_the_server_does_by_default(
    shared_url: str, postgresql: Any
) -> None:
    name = shared_url.split("/")[3].split("?")[0]
    postgresql.sql(f"ALTER DATABASE {name} SET synchronous_commit = off")
    ledger = Ledger(shared_url)
    with ledger.reading() as tx:
        assert tx._connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
    ledger.close()


@pytest.mark.parametrize(
    ("change", "meaning"),
    [
        (lambda url: url.replace("host=", "host=/nowhere"), "no database answers there"),
        (lambda url: url.replace("gpupool@/", "gpupool:hunter2@/no"), "does not exist"),
        (lambda url: "postgresql://gpupool:hunter2@127.0.0.1:9/x", "no database answers there"),
    ],
)
def test_a_database_that_cannot_be_reached_gets_one_line(
    shared_url: str, change: Callable[[str], str], meaning: str
) -> None:
    with pytest.raises(LedgerUnavailable) as caught:
        Ledger(change(shared_url))
    assert (
        "\n" not in str(caught.value) and "hunter2" not in str(caught.value) and meaning in str(caught.value)
    )


def test_a_session_that_was_cut_changes_nothing_and_the_next_call_works(
    shared_url: str, postgresql: Any, servers: list[Server], ask: Ask
) -> None:
    ledger = Ledger(shared_url)
    manager = Manager(ledger)
    manager.set_servers(servers)
    request = ask()
    postgresql.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
        "AND backend_type = 'client backend'"
    )
    with pytest.raises(LedgerUnavailable) as caught:
        manager.request(request)
    assert "\n" not in str(caught.value)
    assert manager.leases() == []
    lease = manager.request(request).lease
    assert lease is not None and lease.state is LeaseState.GRANTED
    ledger.close()


def test_one_that_no_longer_leads_changes_nothing(shared_url: str, servers: list[Server], ask: Ask) -> None:
    """Whatever it believes: its epoch is asked for in every writing transaction."""
    ledger, other = Ledger(shared_url), Ledger(shared_url)
    ledger.epoch = 0
    manager = Manager(ledger)
    manager.set_servers(servers)
    manager.request(ask(partial=0.5))
    with other.transaction() as tx:
        tx._connection.exec_driver_sql("UPDATE leadership SET epoch = epoch + 1")
    before = manager.snapshot()
    for change in (
        lambda: manager.request(ask(partial=0.5)),
        lambda: manager.release(before.leases[0].id),
        ledger.check,
    ):
        with pytest.raises(NotLeading):
            change()
    assert manager.snapshot() == before
    ledger.close()
    other.close()

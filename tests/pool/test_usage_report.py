"""The report of usage: what was granted, what of it computed, and what nobody knows."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.core.models import Request, WorkerUsage
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool import usage_report
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager
from jupyter_gpupool.pool.tenancy.audit_log import Entry, write
from jupyter_gpupool.pool.usage_history import History, Use
from jupyter_gpupool.pool.usage_report import Held, Measured, attributed
from jupyter_gpupool.server.watch.snapshot import uses

from .conftest import Clock

HOUR = 3600.0


@pytest.fixture
def clock() -> Clock:
    return Clock(1_800_000_000.0)  # a multiple of every slot


@pytest.fixture
def hold(manager: Manager, clock: Clock) -> Callable[..., str]:
    """Have a user hold part of the GPU with that index for so many hours."""

    def hold(owner: str, hours: float, partial: float = 1.0, index: int = 0, namespace: str = "") -> str:
        lease_id = str(uuid.uuid4())
        request = Request(
            lease_id,
            owner,
            partial=partial,
            filters={"index": str(index)},
            namespace=namespace or "default",
            secret_sha256="0" * 64,
        )
        lease = manager.request(request).lease
        assert lease is not None and lease.state.holds
        clock.advance(hours * HOUR)
        manager.release(lease_id)
        return lease_id

    return hold


def read(ledger: Ledger, *words: Any) -> dict[str, Any]:
    reading = usage_report.Reading(*words)
    for step in reading.steps:
        step(ledger)
    return usage_report.report(reading)


def reported(ledger: Ledger, *words: Any) -> dict[str, dict[str, Any]]:
    said = read(ledger, *words)
    return {row["gpu"] or row["name"]: row for row in said["rows"]}


def hours(row: dict[str, Any]) -> tuple[float, ...]:
    return tuple(row[f"{word}_h"] for word in ("granted", "computing", "idle", "unknown"))


def measure(ledger: Ledger, start: float, seconds: int, *busy: float) -> None:
    history = History(ledger)
    for at in range(int(start), int(start) + seconds, 5):
        uses = {gpu.uuid: Use(32510, 0, 0, share) for gpu, share in zip(emulated_gpus("one"), busy)}
        history.record(at, uses)


def test_granted_hours_are_those_of_the_shares_within_the_time(
    ledger: Ledger, clock: Clock, hold: Callable[..., str]
) -> None:
    begun = clock()
    hold("ada", 4, partial=0.5)
    hold("bob", 1)
    hold("ada", 2, index=1)
    whole = reported(ledger, clock(), begun, "user")
    assert {name: (row["leases"], row["granted_h"]) for name, row in whole.items()} == {
        "ada": (2, pytest.approx(4, abs=0.001)),
        "bob": (1, 1),
    }
    assert reported(ledger, clock(), clock() - 2.5 * HOUR, "user")["bob"]["granted_h"] == pytest.approx(0.5)
    assert reported(ledger, clock(), begun, "gpu")["one:0"]["granted_h"] == pytest.approx(3, abs=0.001)
    assert list(reported(ledger, clock(), begun, "namespace")) == ["default"]
    assert set(reported(ledger, clock(), begun, "user", "bob")) == {"bob"}


def test_a_lease_that_goes_on_counts_until_now(ledger: Ledger, clock: Clock, manager: Manager) -> None:
    manager.request(Request(str(uuid.uuid4()), "ada", partial=1.0, secret_sha256="0" * 64))
    clock.advance(HOUR)
    assert hours(reported(ledger, clock())["ada"]) == (1, 0, 0, 1)


def test_hours_are_computing_or_idle_where_it_was_measured(
    ledger: Ledger, clock: Clock, hold: Callable[..., str]
) -> None:
    begun = clock()
    hold("ada", 0.1)
    measure(ledger, begun, 180, 0.25, 0.0)  # half of the time
    assert hours(reported(ledger, clock(), begun)["ada"]) == pytest.approx(
        (0.1, 0.0125, 0.0375, 0.05), abs=2e-4
    )
    said = read(ledger, clock(), begun - HOUR)
    assert said["measured_since"] == begun


def test_the_report_is_of_the_ledgers_time_and_words(ledger: Ledger, clock: Clock) -> None:
    said = read(ledger, clock(), 0.0)
    assert said["since"] == clock() - usage_report.LEASES_KEPT_S
    assert (said["rows"], said["measured_since"]) == ([], None)
    with pytest.raises(InvalidRequest, match="by=room: give one of user, namespace, gpu"):
        usage_report.Reading(clock(), by="room")


def test_leases_that_share_a_gpu_have_computed_for_as_long_as_each_did(
    ledger: Ledger, clock: Clock, manager: Manager, hold: Callable[..., str]
) -> None:
    begun = clock()
    bobs = str(uuid.uuid4())
    request = Request(bobs, "bob", partial=0.5, filters={"index": "0"}, secret_sha256="0" * 64)
    assert manager.request(request).lease is not None
    adas = hold("ada", 0.5, partial=0.5)
    history, servers = History(ledger), manager.granted()[0]
    (gpu, *_) = servers[0].gpus
    for at in range(int(begun), int(clock()), 5):
        is_late = at >= begun + 0.25 * HOUR
        usage = {adas: WorkerUsage(busy={gpu.uuid: 0.25}), bobs: WorkerUsage(busy={gpu.uuid: 1.0 * is_late})}
        history.record(at, uses(servers, {}, usage))
    found = reported(ledger, clock(), begun)
    assert hours(found["ada"]) == pytest.approx((0.25, 0.0625, 0.1875, 0), abs=1e-3)
    assert hours(found["bob"]) == pytest.approx((0.25, 0.125, 0.125, 0), abs=1e-3)
    assert hours(reported(ledger, clock(), begun, "user", "ada")["ada"]) == hours(found["ada"])
    assert hours(reported(ledger, clock(), begun, "gpu")["one:0"]) == pytest.approx(
        (0.5, 0.1875, 0.3125, 0), abs=1e-3
    )


def test_a_sample_that_has_no_leases_leaves_unknown_for_whom_a_shared_gpu_computed() -> None:
    held = [Held("g", "ada", 0, 10, 0.5), Held("g", "bob", 5, 20, 0.5)]
    slots = [Measured(0, 5, {"g": 1.0}), Measured(5, 10, {"g": 0.5}), Measured(10, 15, {"g": 0.0})]
    assert attributed(held, slots) == {"ada": (2.5, 0.0), "bob": (0.0, 2.5)}
    together = [Held(one.gpu, "lab", one.start, one.end, one.share) for one in held]
    computing, idle = attributed(together, slots)["lab"]
    assert (computing, idle) == (2.5 + 2.5, 2.5 + 2.5)


def test_a_lease_that_computed_for_the_short_time_that_it_had_was_never_idle() -> None:
    held = [Held("g", "ada", 100, 160, 1.0)]
    assert attributed(held, [Measured(0, 600, {"g": 0.1})]) == {"ada": (60.0, 0.0)}
    assert attributed(held, [Measured(0, 600, {"other": 0.1})]) == {}


def test_others_on_a_users_gpu_count_but_are_not_shown(
    ledger: Ledger, clock: Clock, manager: Manager, hold: Callable[..., str]
) -> None:
    begun = clock()
    manager.request(
        Request(str(uuid.uuid4()), "bob", partial=0.5, filters={"index": "0"}, secret_sha256="0" * 64)
    )
    hold("ada", 0.05, partial=0.5)
    measure(ledger, begun, 180, 1.0, 0.0)
    for by in ("user", "namespace", "gpu"):
        (row,) = reported(ledger, clock(), begun, by, "ada").values()
        assert hours(row) == pytest.approx((0.025, 0, 0, 0.025), abs=2e-4)
    assert reported(ledger, clock(), begun, "gpu")["one:0"]["unknown_h"] == pytest.approx(0, abs=2e-4)


def test_hours_in_which_a_lease_was_parked_are_not_granted_hours(
    ledger: Ledger, clock: Clock, hold: Callable[..., str]
) -> None:
    begun = clock()
    adas = hold("ada", 10)
    bobs = hold("bob", 1)
    # Bob's was parked before the first entry that is kept, Ada's ended while it was parked.
    log = [(adas, "park", 2), (adas, "resume", 5), (adas, "park", 9.5), (bobs, "resume", 10.25)]
    with ledger.transaction() as tx:
        write(tx, [Entry(begun + hours * HOUR, action, id) for id, action, hours in log])
    whole = reported(ledger, clock(), begun)
    assert (whole["ada"]["granted_h"], whole["ada"]["parked_h"]) == pytest.approx((6.5, 3.5), abs=1e-3)
    assert (whole["bob"]["granted_h"], whole["bob"]["parked_h"]) == pytest.approx((0.75, 0.25), abs=1e-3)
    late = reported(ledger, clock(), begun + 4 * HOUR)["ada"]
    assert (late["granted_h"], late["parked_h"]) == pytest.approx((4.5, 1.5), abs=1e-3)


def test_who_has_a_parked_leases_gpu_is_known(
    ledger: Ledger, clock: Clock, manager: Manager, hold: Callable[..., str]
) -> None:
    begun = clock()
    adas = hold("ada", 0.05, partial=0.5)
    hold("bob", 0.05, partial=0.5)
    with ledger.transaction() as tx:
        write(tx, [Entry(begun + 60, "park", adas)])
    measure(ledger, begun, 60, 0.0)
    measure(ledger, begun + 60, 300, 1.0)
    found = reported(ledger, clock(), begun)
    assert hours(found["ada"]) == pytest.approx((1 / 120, 0, 1 / 120, 0), abs=1e-4)
    assert hours(found["bob"]) == pytest.approx((0.025, 0.025, 0, 0), abs=1e-4)

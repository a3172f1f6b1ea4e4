"""What namespaces may hold, who may do what in them, and when their leases end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from jupyter_gpupool.core.errors import (
    ImpossibleRequest,
    InvalidRequest,
    LeaseEnded,
    NamespaceConflict,
    NoCapacity,
    PermissionDenied,
    UnknownLease,
    UnknownNamespace,
)
from jupyter_gpupool.core.models import Lease, LeaseState, Request, Server, StopWorker, WorkerAddress
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager
from jupyter_gpupool.pool.tenancy import audit_log
from jupyter_gpupool.pool.tenancy.audit_log import Entry

Ask = Callable[..., Request]


def namespace(manager: Manager, name: str = "lab", owner: str | None = None, **fields: Any) -> None:
    """Make it, or change it."""

    def change(known: Any, tx: Any) -> None:
        if name in [of.name for of in known.all()]:
            known.change(tx, name, fields, owner)
        else:
            known.create(tx, name, fields)

    manager.administer(change, Entry(0.0, "namespace", name))


def member(manager: Manager, user: str, role: str, name: str = "lab", owner: str | None = None) -> None:
    manager.administer(lambda k, tx: k.set_member(tx, name, user, role, owner), Entry(0.0, "member", name))


@pytest.fixture
def patient(ledger: Ledger, clock: Any, servers: list[Server]) -> Manager:
    """One that waits long for signs of life, so that time can pass in large steps."""
    manager = Manager(ledger, clock, ttl_s=1e6)
    manager.set_servers(servers)
    return manager


def granted(manager: Manager, request: Request, worker: WorkerAddress) -> Lease:
    manager.request(request)
    lease = manager.worker_started(request.id, worker).lease
    assert lease is not None and lease.state is LeaseState.ACTIVE
    return lease


@pytest.mark.parametrize(
    ("limits", "asked", "said"),
    [
        (
            {"memory_mib": 30000},
            {"num_gpus": 2, "partial": 0.5},
            "may hold 30000 MiB, and this is 32510 more",
        ),
        ({"gpus": 1.5}, {"num_gpus": 2, "partial": 0.8}, "may hold 1.5 GPUs, and this is 1.6 more"),
        ({"leases": 0}, {"partial": 0.1}, "may hold 0 leases, and this is 1 more"),
        ({"gpus": 2, "user_share": 0.5}, {"num_gpus": 2, "partial": 0.6}, "one user of .* 1 GPUs"),
    ],
)
def test_what_is_beyond_a_limit_is_refused_at_once(
    manager: Manager, ask: Ask, limits: dict, asked: dict, said: str
) -> None:
    namespace(manager, limits=limits)
    with pytest.raises(ImpossibleRequest, match=f"namespace 'lab'.*{said}|{said}"):
        manager.request(ask(namespace="lab", **asked))
    with pytest.raises(ImpossibleRequest):
        manager.forecast(ask(namespace="lab", **asked))
    assert manager.leases() == []


def test_what_is_beyond_what_is_left_waits_and_says_for_what(
    manager: Manager, ask: Ask, worker: WorkerAddress
) -> None:
    namespace(manager, limits={"gpus": 1.0})
    first = granted(manager, ask(namespace="lab", partial=0.8), worker)
    forecast = manager.forecast(ask(namespace="lab", partial=0.5))
    assert forecast.state is LeaseState.QUEUED and "'lab' may hold 1 GPUs, holds 0.8" in forecast.waits_for
    waiting = ask(namespace="lab", partial=0.5)
    manager.request(waiting)
    assert "holds 0.8, and this is 0.5 more" in manager.lease(waiting.id).waits_for
    with pytest.raises(NoCapacity, match="'lab' may hold 1 GPUs, holds 0.8"):
        manager.request(ask(namespace="lab", partial=0.5, wait=False))
    other = ask(partial=0.5)
    assert manager.request(other).lease.state is LeaseState.GRANTED, "another namespace is not held up"  # type: ignore[union-attr]
    manager.release(first.id)
    assert manager.lease(waiting.id).state is LeaseState.GRANTED and not manager.lease(waiting.id).waits_for


def test_raising_a_limit_grants_what_waits(manager: Manager, ask: Ask, clock: Any) -> None:
    namespace(manager, limits={"leases": 1})
    manager.request(ask(namespace="lab", partial=0.1))
    waiting = ask(namespace="lab", partial=0.1)
    manager.request(waiting)
    namespace(manager, limits={"leases": 2})
    assert manager.lease(waiting.id).state is LeaseState.GRANTED


def test_one_user_at_their_share_holds_up_nobody_else(manager: Manager, ask: Ask) -> None:
    namespace(manager, limits={"leases": 4, "user_share": 0.5})
    for _ in range(2):
        assert manager.request(ask(namespace="lab", partial=0.1)).lease.state is LeaseState.GRANTED  # type: ignore[union-attr]
    third = ask(namespace="lab", partial=0.1)
    assert "one user of" in manager.request(third).lease.waits_for  # type: ignore[union-attr]
    eve = ask(namespace="lab", partial=0.1, owner="eve")
    assert manager.request(eve).lease.state is LeaseState.GRANTED  # type: ignore[union-attr]


def test_a_limit_finds_the_gpu_that_is_within_it(ledger: Ledger, clock: Any, ask: Ask) -> None:
    """Half of the large GPU is too much; half of the small one is not."""
    from jupyter_gpupool.gpus import emulated_gpus

    manager = Manager(ledger, clock)
    gpus = (*emulated_gpus("a", count=1, memory_mib=1000), *emulated_gpus("b", count=1, memory_mib=400))
    manager.set_servers([Server(gpu.server, "127.0.0.1", (gpu,)) for gpu in gpus])
    manager.request(ask(memory_mib=100, filters={"server": "a"}))  # best fit would take a from here on
    manager.request(ask(memory_mib=380, filters={"server": "a"}))
    namespace(manager, limits={"memory_mib": 300})
    lease = manager.request(ask(namespace="lab", partial=0.5)).lease
    assert lease is not None and [piece.server for piece in lease.slices] == ["b"]


def test_resizing_keeps_to_the_limits(manager: Manager, ask: Ask, worker: WorkerAddress) -> None:
    namespace(manager, limits={"gpus": 1.0})
    one = granted(manager, ask(namespace="lab", partial=0.4, filters={"index": "0"}), worker)
    manager.request(ask(namespace="lab", partial=0.4, filters={"index": "1"}))
    with pytest.raises(NoCapacity, match="stays as it is.*may hold 1 GPUs, holds 0.8"):
        manager.resize(one.id, 0.7, None)
    assert manager.resize(one.id, 0.6, None).lease.slices[0].memory_mib == 19506  # type: ignore[union-attr]
    namespace(manager, limits={"gpus": 0.5})
    with pytest.raises(ImpossibleRequest, match="may hold 0.5 GPUs"):
        manager.resize(one.id, 0.7, None)
    assert manager.resize(one.id, 0.1, None).lease.slices[0].memory_mib == 3251, "less is always well"  # type: ignore[union-attr]


def test_lowering_a_limit_takes_nothing_away(manager: Manager, ask: Ask, worker: WorkerAddress) -> None:
    namespace(manager, limits={"leases": 2})
    lease = granted(manager, ask(namespace="lab", partial=0.5), worker)
    waiting = ask(namespace="lab", partial=1.0, num_gpus=2)
    manager.request(waiting)
    namespace(manager, limits={"leases": 0})
    assert manager.lease(lease.id).state is LeaseState.ACTIVE
    assert manager.lease(waiting.id).state is LeaseState.QUEUED


def test_weights_share_what_is_waited_for(manager: Manager, ask: Ask) -> None:
    """Both ask for more than there is; the one that weighs three times as much gets three times as much."""
    for name, weight in (("heavy", 3), ("light", 1)):
        namespace(manager, name, weight=weight)
    blocking = ask(num_gpus=2)
    manager.request(blocking)
    for _ in range(16):
        for name in ("light", "heavy"):
            manager.request(ask(namespace=name, memory_mib=32510 // 8))
    manager.release(blocking.id)
    held = [lease.request.namespace for lease in manager.snapshot().leases]
    assert len(held) == 16 and held.count("heavy") == 12 and held.count("light") == 4


def test_the_longest_lease_ends_and_its_worker_with_it(
    patient: Manager, ask: Ask, worker: WorkerAddress, clock: Any
) -> None:
    namespace(patient, limits={"lease_s": 7200.0})
    lease = granted(patient, ask(namespace="lab"), worker)
    assert lease.expires_at == clock.now + 7200
    clock.advance(7190)
    assert patient.tick().actions == ()
    clock.advance(11)
    change = patient.tick()
    ended = patient.lease(lease.id)
    assert change.actions == (StopWorker(lease.id),) and ended.state is LeaseState.EXPIRED
    assert ended.reason.startswith("its time was over at 1970-01-12T15:46:40Z")
    assert "'lab' last 2 h at most" in ended.reason


def test_more_time(patient: Manager, ask: Ask, worker: WorkerAddress, clock: Any, ledger: Ledger) -> None:
    namespace(patient, limits={"lease_s": 3600})
    lease = granted(patient, ask(namespace="lab"), worker)
    with pytest.raises(ImpossibleRequest, match="last 1 h at most, counted from now: it has as much already"):
        patient.extend(lease.id, 60)
    clock.advance(600)
    patient.heartbeat(lease.id)
    with pytest.raises(ImpossibleRequest, match=r"ask for 10 min \(600 s\) at most"):
        patient.extend(lease.id, 601, "ada")
    longer = patient.extend(lease.id, 600, "ada").lease
    assert longer is not None and longer.expires_at == clock.now + 3600
    assert Manager(ledger, clock).lease(lease.id).expires_at == longer.expires_at, "a restarted pool knows"
    for wrong in (0, -1, float("nan"), 1e12, True):
        with pytest.raises(InvalidRequest):
            patient.extend(lease.id, wrong)
    with pytest.raises(UnknownLease):
        patient.extend(lease.id, 1, "eve")
    endless = granted(patient, ask(num_gpus=1, partial=0.1), worker)
    with pytest.raises(InvalidRequest, match="does not expire"):
        patient.extend(endless.id, 60)
    patient.release(lease.id)
    with pytest.raises(LeaseEnded):
        patient.extend(lease.id, 1)


def test_who_computes_nothing_is_told_and_then_released(
    patient: Manager, ask: Ask, worker: WorkerAddress, clock: Any
) -> None:
    namespace(patient, limits={"idle_s": 600})
    lease = granted(patient, ask(namespace="lab"), worker)
    began = clock.now

    def later(seconds: float) -> Lease:
        clock.advance(seconds)
        patient.tick()
        return patient.lease(lease.id)

    assert later(20).idle_since is None, "a pause is no idleness"
    assert [later(14).idle_since for _ in range(3)] == [began] * 3
    patient.computing([lease.id])
    assert later(1).idle_since is None
    assert later(598).state is LeaseState.ACTIVE
    patient.keep(lease.id, "ada")
    assert later(1).idle_since is None
    assert later(598).state is LeaseState.ACTIVE
    ended = later(3)
    assert ended.state is LeaseState.RELEASED
    assert ended.reason == "it computed nothing for 10 min, which is as long as the namespace 'lab' allows"


def test_a_colleague_asks_for_a_lease(
    manager: Manager, ask: Ask, worker: WorkerAddress, ledger: Ledger
) -> None:
    namespace(manager)
    for user in ("ada", "bob", "cyd"):
        member(manager, user, "use")
    lease = granted(manager, ask(namespace="lab"), worker)
    with pytest.raises(UnknownLease):
        manager.ask(lease.id, "bob", "soon?", "bob")
    namespace(manager, names_holders=True)
    manager.ask(lease.id, "bob", "soon?", "bob")
    manager.ask(lease.id, "cyd", "", "cyd")
    asked = manager.ask(lease.id, "bob", "please", "bob").lease
    assert asked is not None
    assert [(one.by, one.message) for one in asked.asked_back] == [("cyd", ""), ("bob", "please")]
    assert Manager(ledger, lambda: 0.0).lease(lease.id).asked_back == asked.asked_back
    with pytest.raises(UnknownLease):
        manager.ask(lease.id, "eve", "", "eve")
    with pytest.raises(InvalidRequest, match="your own"):
        manager.ask(lease.id, "ada", "", "ada")
    with pytest.raises(InvalidRequest):
        manager.ask(lease.id, "bob", "two\nlines", "bob")
    for number in range(40):
        manager.ask(lease.id, f"user {number}")
    assert len(manager.lease(lease.id).asked_back) == 16
    with pytest.raises(UnknownLease):
        manager.keep(lease.id, "bob")
    assert manager.keep(lease.id, "ada").lease.asked_back == ()  # type: ignore[union-attr]


def test_roles(manager: Manager, ask: Ask, worker: WorkerAddress) -> None:
    namespace(manager, limits={"gpus": 2, "lease_s": 3600})
    for user, role in (("vi", "view"), ("ada", "use"), ("boss", "administer")):
        member(manager, user, role)
    known = manager.namespaces
    known.check_use("ada", "lab")
    known.check_use("boss", "lab")
    with pytest.raises(PermissionDenied, match="may look at the namespace 'lab', not use it"):
        known.check_use("vi", "lab")
    with pytest.raises(PermissionDenied, match="not a member of the namespace 'lab'"):
        known.check_use("eve", "lab")
    known.check_use("eve", "default")
    lease = granted(manager, ask(namespace="lab"), worker)
    assert manager.leases(owner="vi") == manager.leases(owner="eve") == []
    assert [found.id for found in manager.leases(owner="boss")] == [lease.id]
    for owner in ("vi", "eve"):
        with pytest.raises(UnknownLease):
            manager.release(lease.id, owner)
    with pytest.raises(UnknownLease):
        manager.resize(lease.id, 0.5, None, "boss")
    assert manager.release(lease.id, "boss").lease.state is LeaseState.RELEASED  # type: ignore[union-attr]
    with pytest.raises(PermissionDenied, match="do not administer"):
        namespace(manager, owner="ada", description="mine")
    with pytest.raises(UnknownNamespace, match="not a member of it"):
        namespace(manager, owner="eve", description="mine")


def test_a_namespaces_administrator_goes_as_far_as_the_pools_has_set(manager: Manager) -> None:
    namespace(manager, limits={"gpus": 2})
    member(manager, "boss", "administer")
    with pytest.raises(PermissionDenied, match="allows gpus up to 2, not 3"):
        namespace(manager, owner="boss", limits={"gpus": 3})
    with pytest.raises(PermissionDenied, match="can change a namespace's weight"):
        namespace(manager, owner="boss", weight=5)
    namespace(manager, owner="boss", limits={"gpus": 1, "leases": 5}, names_holders=True)
    lab = manager.namespaces.find("lab")
    assert (lab.limits.gpus, lab.limits.leases, lab.ceiling.gpus, lab.ceiling.leases) == (1, 5, 2, None)
    namespace(manager, owner="boss", limits={"gpus": None})
    assert manager.namespaces.find("lab").limits.gpus == 2, "no limit of one's own is the pool's"
    namespace(manager, owner="boss", limits={"gpus": 1})
    namespace(manager, limits={"gpus": 0.5})
    assert manager.namespaces.find("lab").limits.gpus == 0.5
    member(manager, "ada", "use", owner="boss")
    with pytest.raises(PermissionDenied, match="would not administer"):
        member(manager, "boss", "use", owner="boss")


@pytest.mark.parametrize(
    "fields",
    [
        {"limits": {"gpu": 1}},
        {"limits": {"gpus": -1}},
        {"limits": {"gpus": float("nan")}},
        {"limits": {"leases": 1.5}},
        {"limits": {"leases": True}},
        {"limits": {"user_share": 0}},
        {"limits": {"user_share": 1.1}},
        {"limits": {"lease_s": 0}},
        {"limits": []},
        {"weight": 0},
        {"weight": "1"},
        {"names_holders": 1},
        {"description": "two\nlines"},
        {"members": {"ada": "owner"}},
        {"members": {"": "use"}},
        {"members": {"ada": 1}},
    ],
)
def test_what_makes_no_sense_changes_nothing(manager: Manager, fields: dict) -> None:
    with pytest.raises(InvalidRequest):
        namespace(manager, **fields)
    assert [of.name for of in manager.namespaces.all()] == ["default"]
    with pytest.raises(InvalidRequest):
        namespace(manager, "default", **fields)
    assert manager.namespaces.find("default").limits.gpus is None


def test_which_namespaces_there_are(manager: Manager, ask: Ask, ledger: Ledger, clock: Any) -> None:
    assert manager.request(ask(namespace="any", partial=0.1)).lease is not None, (
        "a word, while there are none"
    )
    namespace(manager, "lab")
    with pytest.raises(UnknownNamespace, match="no namespace 'any'; its administrator creates one"):
        manager.request(ask(namespace="any", partial=0.1))
    assert manager.request(ask(partial=0.1)).lease is not None
    with pytest.raises(NamespaceConflict, match="already"):
        manager.administer(lambda k, tx: k.create(tx, "lab", {}), Entry(0.0, "", ""))
    lease = manager.request(ask(namespace="lab", partial=0.1)).lease
    assert lease is not None

    def delete(name: str) -> None:
        manager.administer(lambda k, tx: k.delete(tx, name), Entry(0.0, "", name))

    with pytest.raises(NamespaceConflict, match="1 live leases and requests"):
        delete("lab")
    with pytest.raises(NamespaceConflict, match="'default' cannot be deleted"):
        delete("default")
    manager.release(lease.id)
    member(manager, "ada", "use")
    assert Manager(ledger, clock).namespaces.all() == manager.namespaces.all()
    delete("lab")
    assert [of.name for of in manager.namespaces.all()] == ["default"]
    with pytest.raises(UnknownNamespace):
        delete("lab")


def test_another_process_changes_a_namespace(manager: Manager, ask: Ask, ledger: Ledger, clock: Any) -> None:
    namespace(manager, limits={"leases": 0})
    waiting = ask(namespace="lab", partial=0.1)
    with pytest.raises(ImpossibleRequest):
        manager.request(waiting)
    namespace(Manager(ledger, clock), limits={"leases": None})
    manager.tick()
    assert manager.request(waiting).lease.state is LeaseState.GRANTED  # type: ignore[union-attr]


def test_the_audit_trail(
    manager: Manager, ask: Ask, ledger: Ledger, worker: WorkerAddress, clock: Any
) -> None:
    namespace(manager, limits={"gpus": 1})
    lease = granted(manager, ask(namespace="lab", partial=0.8), worker)
    with pytest.raises(ImpossibleRequest):
        manager.request(ask(namespace="lab", num_gpus=2, owner="bob"))
    manager.tick()
    token = audit_log.acting.set("root")
    manager.release(lease.id)
    audit_log.acting.reset(token)
    with ledger.reading() as tx:
        entries = audit_log.read(tx)
    assert [(entry.action, entry.actor, entry.namespace) for entry in entries] == [
        ("namespace", "", ""),
        ("request", "ada", "lab"),
        ("grant", "", "lab"),
        ("refuse", "bob", "lab"),
        ("release", "root", "lab"),
    ]
    assert "may hold 1 GPUs" in entries[3].outcome and "26008 MiB" in entries[2].outcome
    clock.advance(91 * 86400)
    manager.tick()
    with ledger.reading() as tx:
        assert audit_log.read(tx) == []

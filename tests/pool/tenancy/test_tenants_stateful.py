"""The machine of test_life with tenants: limits that change, one user's share, leases that expire or lie idle."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from jupyter_gpupool.core.errors import ImpossibleRequest
from jupyter_gpupool.core.models import Change, Lease, LeaseState, Request, Snapshot, StartWorker
from jupyter_gpupool.pool.scheduling import quotas, resumption
from jupyter_gpupool.pool.scheduling.placement_index import PlacementIndex
from jupyter_gpupool.pool.scheduling.quotas import Holding
from jupyter_gpupool.pool.tenancy.audit_log import Entry

from ...conftest import often
from ..test_manager_stateful import SERVERS, TTL, Life

#: What may be set of the namespaces, tight and loose.
LIMITS = [
    {"gpus": 1.2, "leases": 3, "user_share": 0.6, "memory_mib": None, "lease_s": 20.0, "idle_s": None},
    {"gpus": None, "leases": None, "user_share": 0.5, "memory_mib": 900, "lease_s": None, "idle_s": 12.0},
    {"gpus": 3.0, "leases": 1, "user_share": None, "memory_mib": None, "lease_s": 40.0, "idle_s": 30.0},
    {"gpus": None, "leases": None, "user_share": None, "memory_mib": None, "lease_s": None, "idle_s": None},
]


class Tenants(Life):
    @initialize()
    def begin(self) -> None:
        super().begin()
        self.turn = 0
        self.until: dict[str, float | None] = {}
        self.computed: dict[str, float] = {}
        for name, weight, which in (("a", 2.0, 0), ("b", 1.0, 1)):
            fields = {"weight": weight, "limits": LIMITS[which]}
            self.administer(lambda known, tx, n=name, f=fields: known.create(tx, n, f))

    def administer(self, change: Any) -> None:
        self.carry_out(self.manager.administer(change, Entry(0.0, "", "")))

    def owner_of(self, namespace: str) -> str:
        self.turn += 1
        return f"user-{self.turn % 2}"

    def never(self, request: Request) -> str | None:
        return quotas.impossible(
            request,
            PlacementIndex(SERVERS),
            self.manager.namespaces.find(request.namespace),
            request.owner,
        )

    def held(self) -> dict[tuple[str, str], Holding]:
        held: dict[tuple[str, str], Holding] = defaultdict(Holding)
        snapshot = self.manager.snapshot()
        woken = [lease for lease in snapshot.queue if lease.parked]
        for lease in (
            *snapshot.leases,
            *snapshot.parked,
            *woken,
        ):  # parked ones keep their place within the limits
            held[lease.request.namespace, lease.request.owner] += quotas.of_slices(lease.slices)
        return held

    def limited(self, lease: Lease, wanted: list[int]) -> bool:
        of = self.manager.namespaces.find(lease.request.namespace)
        within = quotas.bounds(of, lease.request.owner, self.held())
        sizes = [
            replace(piece, memory_mib=mib)
            for mib, piece in zip(wanted, lease.slices, strict=True)
            if mib <= piece.total_mib
        ]
        return len(sizes) == len(wanted) and quotas.objection_to(lease.slices, sizes, within) is not None

    def carry_out(self, change: Change) -> None:
        super().carry_out(change)
        for action in change.actions:
            if isinstance(action, StartWorker) and action.lease.id not in self.until:
                self.granted(action.lease)
        for lease in change.changed:
            if lease.state is LeaseState.ACTIVE:
                self.computed.setdefault(lease.id, self.now)

    def granted(self, lease: Lease) -> None:
        """Whatever was held before, a grant leaves its namespace and its user within the limits of now."""
        of = self.manager.namespaces.find(lease.request.namespace)
        for bound in quotas.bounds(of, lease.request.owner, self.held()):
            assert bound.held.leases <= bound.leases and bound.held.memory_mib <= bound.memory_mib
            assert bound.held.gpus <= bound.gpus + 1e-6, "more was granted than the limit"
        longest = of.limits.lease_s
        assert lease.expires_at == (None if longest is None else self.now + longest)
        self.until[lease.id] = lease.expires_at

    # -- what tenants do --------------------------------------------------------------------------

    @rule(name=st.sampled_from(["a", "b"]), which=st.sampled_from(LIMITS))
    def set_limits(self, name: str, which: dict[str, Any]) -> None:
        self.administer(lambda known, tx: known.change(tx, name, {"limits": which}, None))

    @precondition(lambda self: self.slices.keys() - self.ended.keys())
    @rule(data=st.data(), seconds=st.sampled_from([1.0, 10.0, 100.0]))
    def extend(self, data: st.DataObject, seconds: float) -> None:
        id = data.draw(st.sampled_from(sorted(self.slices.keys() - self.ended.keys())))
        before = self.manager.lease(id)
        longest = self.manager.namespaces.find(before.request.namespace).limits.lease_s
        if before.expires_at is None:
            return
        fits = longest is None or before.expires_at + seconds <= self.now + longest
        try:
            change = self.manager.extend(id, seconds, before.request.owner)
        except ImpossibleRequest:
            assert not fits and self.manager.lease(id) == before
            return
        assert fits and change.lease is not None and change.lease.expires_at == before.expires_at + seconds
        self.until[id] = change.lease.expires_at

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        ids = data.draw(st.sets(st.sampled_from(sorted(self.workers))))
        self.manager.computing(ids)
        self.computed.update(dict.fromkeys(ids, self.now))

    @rule()
    def tick(self) -> None:
        before = {lease.id for lease in self.manager.leases()}
        super().tick()
        for id in before:
            lease, until = self.manager.lease(id), self.until.get(id)
            idle_s = self.manager.namespaces.find(lease.request.namespace).limits.idle_s
            over = until is not None and until <= self.now
            idle = idle_s is not None and id in self.computed and self.now - self.computed[id] > idle_s
            if over and lease.state.holds:
                assert lease.granted_at == self.now, "a lease outlived its time"
            if lease.state is LeaseState.ACTIVE:
                assert not idle, "an idle lease outlived its namespace's limit"
            if lease.reason.startswith("its time"):
                assert over
            if lease.reason.startswith("it computed nothing"):
                assert idle

    @rule(data=st.data(), servers_first=st.booleans())
    def restart(self, data: st.DataObject, servers_first: bool) -> None:
        super().restart(data, servers_first)
        for id in self.computed:
            self.computed[id] = self.now

    # -- what must always be true -----------------------------------------------------------------

    def fair(self, everything: dict[str, Lease], snapshot: Snapshot) -> None:
        heard = {id for id, beat in self.beats.items() if self.now - beat <= TTL}
        held = self.held()
        queue = snapshot.queue
        if queue and queue[0].parked:
            if queue[0].id in heard:
                assert resumption.place(queue[0], SERVERS, snapshot.granted_mib) is None
        elif queue and queue[0].id in heard:
            of = self.manager.namespaces.find(queue[0].request.namespace)
            within = quotas.bounds(of, queue[0].request.owner, held)
            slices, _, _ = quotas.place(
                queue[0].request, PlacementIndex(SERVERS), snapshot.granted_mib, within
            )
            assert slices is None, "what fits is not left waiting"
        for id, until in self.until.items():
            assert everything[id].expires_at == until, "only who extends a lease changes its end"


Tenants.TestCase.settings = settings(
    max_examples=often(15, 300),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLifeOfTenants = pytest.mark.soak(Tenants.TestCase)

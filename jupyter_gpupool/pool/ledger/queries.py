"""The ledger's SQL, built once: building a statement takes longer than SQLite takes to run it."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

from sqlalchemy import Select, Update, bindparam, delete, func, insert, literal_column, select, update

from jupyter_gpupool.core.models import LeaseState

from .tables import gpus, leadership, leases, schema_version, slices

HOLDING = tuple(state for state in LeaseState if state.holds)
WITH_WORKER = tuple(state for state in LeaseState if state.has_worker)
LIVE = tuple(state for state in LeaseState if not state.ended)
EVERY = tuple(LeaseState)


def _in_state(states: Collection[LeaseState]) -> Any:
    # Literals, not parameters: the words are ours, and a list of literals is compiled only once.
    return leases.c.state.in_([literal_column(f"'{state.value}'") for state in states])


FIND_IDS = select(leases.c.id).where(leases.c.id.in_(bindparam("ids", expanding=True)))
FIND_LEASE = select(leases).where(leases.c.id == bindparam("lease_id"))
SLICES_OF = select(slices).where(slices.c.lease == bindparam("seq")).order_by(slices.c.gpu_index)
SLICES_OF_MANY = (
    select(slices)
    .where(slices.c.lease.in_(bindparam("seqs", expanding=True)))
    .order_by(slices.c.lease, slices.c.gpu_index)
)
GRANTED_MIB = select(gpus.c.uuid, gpus.c.used_mib)
HELD = (
    select(
        leases.c.namespace,
        leases.c.owner,
        func.sum(slices.c.memory_mib).label("memory_mib"),
        func.sum(slices.c.memory_mib * literal_column("1.0") / slices.c.total_mib).label("gpus"),
        func.count(leases.c.seq.distinct()).label("leases"),
    )
    .join(slices, slices.c.lease == leases.c.seq)
    .where(_in_state(WITH_WORKER))
    .group_by(leases.c.namespace, leases.c.owner)
)
FILTERS_ASKED_FOR = (
    select(leases.c.filters, func.count().label("times"))
    .where(leases.c.filters != "{}")
    .group_by(leases.c.filters)
)
GPUS = select(gpus)

INSERT_LEASES = insert(leases)
CLEAR_SLICES = delete(slices).where(slices.c.lease == bindparam("of_seq"))
ADD_SLICE = insert(slices)
ADD_GPU = insert(gpus)
SET_GPU = (
    update(gpus)
    .where(gpus.c.uuid == bindparam("gpu"))
    .values(server=bindparam("at_server"), memory_mib=bindparam("memory"))
)
SET_SLICE = (
    update(slices)
    .where(
        slices.c.gpu_uuid == bindparam("gpu"),
        slices.c.memory_mib == bindparam("before"),
        slices.c.lease.in_(
            select(leases.c.seq).where(leases.c.id == bindparam("lease_id"), _in_state(HOLDING))
        ),
    )
    .values(memory_mib=bindparam("memory"))
)
USE_GPU = (
    update(gpus)
    .where(gpus.c.uuid == bindparam("gpu"))
    .values(used_mib=gpus.c.used_mib + bindparam("more_mib"))
)

_CHANGING = (
    "expires_at",
    "asked_back",
    "state",
    "reason",
    "granted_at",
    "ended_at",
    "worker_host",
    "worker_port",
    "worker_pid",
    "worker_created",
    "worker_environment",
    "worker_torch",
    "workers_elsewhere",
    "parked",
    "moving_to",
)
CHANGE_LEASES = (
    update(leases)
    .where(leases.c.seq == bindparam("of_seq"), leases.c.state == bindparam("from_state"))
    .values({name: bindparam(f"to_{name}") for name in _CHANGING})
)
LIVE_SEQS = select(leases.c.id, leases.c.seq).where(_in_state(LIVE))
NEWEST_SEQ = select(func.max(leases.c.seq))

_OLD = leases.c.ended_at < bindparam("before")
PRUNE_SLICES = delete(slices).where(slices.c.lease.in_(select(leases.c.seq).where(_OLD)))
PRUNE_LEASES = delete(leases).where(_OLD)

TOUCH_VERSION: Update = update(schema_version).values(version=schema_version.c.version)


#: For several daemons on one PostgreSQL: the first statement of every writing transaction, which serializes them.
COUNT_CHANGE = update(leadership).values(changes=leadership.c.changes + 1).returning(leadership.c.changes)
COUNT_LEADERS_CHANGE = COUNT_CHANGE.where(leadership.c.epoch == bindparam("of_epoch"))
TAKE_LEAD = (
    update(leadership)
    .values(epoch=leadership.c.epoch + 1, leader=bindparam("name"))
    .returning(leadership.c.epoch)
)
FIND_CHANGES = select(leadership.c.changes)
FIND_LEADER = select(leadership.c.epoch, leadership.c.leader)


@cache
def find_leases(states: tuple[LeaseState, ...], owned: bool, managing: bool, limited: bool) -> Select[Any]:
    """The newest leases first.

    ``owned``: only those of the parameter ``wanted_owner``. ``managing``: also those of the namespaces in ``managed``.
    ``limited``: at most ``newest``.
    """
    query = select(leases).where(_in_state(states)).order_by(leases.c.seq.desc())
    if owned:
        own = leases.c.owner == bindparam("wanted_owner")
        if managing:
            own |= leases.c.namespace.in_(bindparam("managed", expanding=True))
        query = query.where(own)
    return query.limit(bindparam("newest")) if limited else query

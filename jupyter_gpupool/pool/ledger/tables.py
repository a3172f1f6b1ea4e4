"""The ledger's tables, and how leases become rows and come back.

The database guards what it can by itself: a GPU's ``used_mib`` never exceeds its ``memory_mib``, a
lease has a GPU at most once, a request's id is unique, and states are words that exist.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    false,
)

from jupyter_gpupool.core.models import AskedBack, Lease, LeaseState, Parked, Request, Slice, WorkerAddress
from jupyter_gpupool.pool.scheduling.placement import in_order

#: The newest step in migrations/versions. A change of the tables below is a step there, and one more here.
SCHEMA_VERSION = 11

metadata = MetaData()

_STATES = ", ".join(f"'{state.value}'" for state in LeaseState)

schema_version = Table(
    "gpupool_schema",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
)

#: Of several daemons on one PostgreSQL, see leadership.py: one row.
leadership = Table(
    "leadership",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    #: One more with every daemon that took the lead.
    Column("epoch", BigInteger, nullable=False),
    #: One more with every writing transaction.
    Column("changes", BigInteger, nullable=False),
    #: Where the one that leads answers, for people.
    Column("leader", Text, nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)

gpus = Table(
    "gpus",
    metadata,
    Column("uuid", String(80), primary_key=True),
    Column("server", String(255), nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("used_mib", Integer, nullable=False, default=0),
    CheckConstraint("used_mib >= 0 AND used_mib <= memory_mib", name="never_beyond_memory"),
)

leases = Table(
    "leases",
    metadata,
    # The order of arrival. Not created_at: clocks go backwards at times.
    Column("seq", Integer, primary_key=True),
    Column("id", String(36), nullable=False, unique=True),
    Column("owner", Text, nullable=False),
    Column("namespace", String(63), nullable=False),
    Column("num_gpus", Integer, nullable=False),
    Column("partial", Double),
    Column("memory_mib", Integer),
    Column("filters", Text, nullable=False),
    Column("wait", Boolean, nullable=False),
    Column("secret_sha256", String(64), nullable=False),
    Column("label", Text, nullable=False),
    Column("client", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False, default=""),
    Column("created_at", Double, nullable=False),
    Column("granted_at", Double),
    Column("ended_at", Double),
    Column("ttl_s", Double, nullable=False),
    Column("worker_host", Text),
    Column("worker_port", Integer),
    Column("worker_pid", Integer),
    Column("worker_created", Double),
    Column("worker_environment", Text),
    Column("worker_torch", Text),
    Column("expires_at", Double),
    Column("asked_back", Text),
    # With a default, for a daemon of the version before knows nothing of it.
    Column("spread", Boolean, nullable=False, server_default=false()),
    #: WorkerAddress.elsewhere, as JSON.
    Column("workers_elsewhere", Text),
    Column("never_park", Boolean, nullable=False, server_default=false()),
    #: Parked, as JSON; NULL unless the lease is parked.
    Column("parked", Text),
    #: Slices, as JSON; NULL unless the lease is being moved.
    Column("moving_to", Text),
    CheckConstraint(f"state IN ({_STATES})", name="known_state"),
    CheckConstraint("num_gpus >= 1", name="some_gpus"),
    CheckConstraint("(partial IS NULL) <> (memory_mib IS NULL)", name="one_size"),
    Index("leases_by_state", "state"),
    Index("leases_by_end", "ended_at"),
)

slices = Table(
    "slices",
    metadata,
    Column("lease", Integer, ForeignKey("leases.seq", ondelete="CASCADE"), primary_key=True),
    Column("gpu_uuid", String(80), ForeignKey("gpus.uuid"), primary_key=True),
    Column("server", String(255), nullable=False),
    Column("gpu_index", Integer, nullable=False),
    Column("gpu_name", Text, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("total_mib", Integer, nullable=False),
    Column("emulated", Boolean, nullable=False),
    CheckConstraint("memory_mib >= 1 AND memory_mib <= total_mib", name="within_its_gpu"),
)

#: Who may ask this pool, see tokens.py. What a token is worth is not here, only its digest.
tokens = Table(
    "tokens",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("sha256", String(64), nullable=False),
    Column("description", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("namespace", String(63), nullable=False),
    Column("administers", Boolean, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Column("cuts_leases", Boolean, nullable=False, default=False),
    Column("last_used_at", Double),
    Column("scope", String(16), nullable=False, server_default="administer"),
    Column("one_namespace", Boolean, nullable=False, server_default=false()),
)

#: The GPU servers on which nothing new is placed, see drained.py.
drained = Table(
    "drained_servers",
    metadata,
    Column("server", String(255), primary_key=True),
    Column("since", Double, nullable=False),
)

#: Tenants, see namespaces.py; limits are JSON. ``default`` is there without a row, too.
namespaces = Table(
    "namespaces",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("description", Text, nullable=False),
    Column("limits", Text, nullable=False),
    Column("ceiling", Text, nullable=False),
    Column("weight", Double, nullable=False),
    Column("names_holders", Boolean, nullable=False),
    #: NULL: the pool's default.
    Column("reclaim", String(16)),
    CheckConstraint("weight > 0", name="some_weight"),
)

members = Table(
    "members",
    metadata,
    Column("namespace", String(63), ForeignKey("namespaces.name", ondelete="CASCADE"), primary_key=True),
    Column("owner", String(200), primary_key=True),
    Column("role", String(16), nullable=False),
    #: The issuer whose tokens grant the role; NULL where a person gave it.
    Column("issuer", Text),
    CheckConstraint("role IN ('view', 'use', 'administer')", name="known_role"),
)

#: Who asked for what, and what came of it, see audit.py.
audit = Table(
    "audit",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("at", Double, nullable=False),
    Column("actor", Text, nullable=False),
    Column("namespace", String(63), nullable=False),
    Column("action", String(32), nullable=False),
    Column("subject", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Index("audit_by_time", "at"),
)

#: How much of the pool was in use, see history.py; ``gpus`` holds the same of each GPU, compressed.
samples = Table(
    "samples",
    metadata,
    Column("step_s", Integer, primary_key=True, autoincrement=False),
    Column("at", Integer, primary_key=True, autoincrement=False),
    Column("memory_mib", BigInteger, nullable=False),
    Column("granted_mib", BigInteger, nullable=False),
    Column("used_mib", BigInteger, nullable=False),
    Column("busy", Double, nullable=False),
    Column("gpus", LargeBinary, nullable=False),
)


def lease_row(lease: Lease) -> dict[str, Any]:
    """The row of a lease that was just requested."""
    request = lease.request
    return {
        "id": request.id,
        "owner": request.owner,
        "namespace": request.namespace,
        "num_gpus": request.num_gpus,
        "partial": request.partial,
        "memory_mib": request.memory_mib,
        "filters": json.dumps(dict(request.filters), sort_keys=True),
        "spread": request.spread,
        "never_park": request.never_park,
        "wait": request.wait,
        "secret_sha256": request.secret_sha256,
        "label": request.label,
        "client": request.client,
        "state": lease.state.value,
        "reason": lease.reason,
        "created_at": lease.created_at,
        "ttl_s": lease.ttl_s,
    }


def slice_row(seq: int, piece: Slice) -> dict[str, Any]:
    """A slice of the lease with that number, as a row."""
    return {
        "lease": seq,
        "gpu_uuid": piece.gpu_uuid,
        "server": piece.server,
        "gpu_index": piece.index,
        "gpu_name": piece.name,
        "memory_mib": piece.memory_mib,
        "total_mib": piece.total_mib,
        "emulated": piece.emulated,
    }


def slice_from(row: Any) -> Slice:
    """A row as a slice."""
    return Slice(
        gpu_uuid=row.gpu_uuid,
        server=row.server,
        index=row.gpu_index,
        name=row.gpu_name,
        memory_mib=row.memory_mib,
        total_mib=row.total_mib,
        emulated=row.emulated,
    )


def lease_from(row: Any, pieces: Iterable[Slice]) -> Lease:
    """The lease as the ledger knows it: its heartbeat and position are the manager's."""
    worker = None
    if row.worker_port is not None:
        others = json.loads(row.workers_elsewhere) if row.workers_elsewhere else {}
        elsewhere = {server: WorkerAddress(**one) for server, one in others.items()}
        worker = WorkerAddress(
            row.worker_host,
            row.worker_port,
            row.worker_pid,
            row.worker_created,
            elsewhere,
            row.worker_environment or "",
            row.worker_torch or "",
        )
    return Lease(
        request=Request(
            id=row.id,
            owner=row.owner,
            num_gpus=row.num_gpus,
            partial=row.partial,
            memory_mib=row.memory_mib,
            filters=json.loads(row.filters),
            spread=row.spread,
            never_park=row.never_park,
            namespace=row.namespace,
            wait=row.wait,
            secret_sha256=row.secret_sha256,
            label=row.label,
            client=row.client,
        ),
        state=LeaseState(row.state),
        slices=in_order(pieces) if row.spread else tuple(pieces),
        worker=worker,
        reason=row.reason,
        created_at=row.created_at,
        granted_at=row.granted_at,
        ended_at=row.ended_at,
        heartbeat_at=row.created_at,
        ttl_s=row.ttl_s,
        expires_at=row.expires_at,
        asked_back=tuple(AskedBack(**one) for one in json.loads(row.asked_back or "[]")),
        parked=Parked(**json.loads(row.parked)) if row.parked else None,
        moving_to=tuple(Slice(**one) for one in json.loads(row.moving_to or "[]")),
    )

"""Leases, the GPUs that they hold slices of, tokens, and the history.

Versions before Alembic made the same tables, perhaps not all of them: what is there stays as it is.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_STATES = "'QUEUED', 'GRANTED', 'ACTIVE', 'PARKED', 'RELEASED', 'EXPIRED', 'LOST', 'CANCELLED'"


def upgrade() -> None:
    _create(
        "gpupool_schema",
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    )
    _create(
        "gpus",
        sa.Column("uuid", sa.String(80), primary_key=True),
        sa.Column("server", sa.String(255), nullable=False),
        sa.Column("memory_mib", sa.Integer, nullable=False),
        sa.Column("used_mib", sa.Integer, nullable=False),
        sa.CheckConstraint("used_mib >= 0 AND used_mib <= memory_mib", name="never_beyond_memory"),
    )
    _create(
        "leases",
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("id", sa.String(36), nullable=False, unique=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("num_gpus", sa.Integer, nullable=False),
        sa.Column("partial", sa.Double),
        sa.Column("memory_mib", sa.Integer),
        sa.Column("filters", sa.Text, nullable=False),
        sa.Column("wait", sa.Boolean, nullable=False),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("label", sa.Text, nullable=False),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("granted_at", sa.Double),
        sa.Column("ended_at", sa.Double),
        sa.Column("ttl_s", sa.Double, nullable=False),
        sa.Column("worker_host", sa.Text),
        sa.Column("worker_port", sa.Integer),
        sa.Column("worker_pid", sa.Integer),
        sa.Column("worker_created", sa.Double),
        sa.CheckConstraint(f"state IN ({_STATES})", name="known_state"),
        sa.CheckConstraint("num_gpus >= 1", name="some_gpus"),
        sa.CheckConstraint("(partial IS NULL) <> (memory_mib IS NULL)", name="one_size"),
    )
    op.create_index("leases_by_state", "leases", ["state"], if_not_exists=True)
    op.create_index("leases_by_end", "leases", ["ended_at"], if_not_exists=True)
    _create(
        "slices",
        sa.Column("lease", sa.Integer, sa.ForeignKey("leases.seq", ondelete="CASCADE"), primary_key=True),
        sa.Column("gpu_uuid", sa.String(80), sa.ForeignKey("gpus.uuid"), primary_key=True),
        sa.Column("server", sa.String(255), nullable=False),
        sa.Column("gpu_index", sa.Integer, nullable=False),
        sa.Column("gpu_name", sa.Text, nullable=False),
        sa.Column("memory_mib", sa.Integer, nullable=False),
        sa.Column("total_mib", sa.Integer, nullable=False),
        sa.Column("emulated", sa.Boolean, nullable=False),
        sa.CheckConstraint("memory_mib >= 1 AND memory_mib <= total_mib", name="within_its_gpu"),
    )
    _create(
        "tokens",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("administers", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.Column("revoked_at", sa.Double),
        sa.Column("cuts_leases", sa.Boolean, nullable=False),
        sa.Column("last_used_at", sa.Double),
    )
    _create(
        "samples",
        sa.Column("step_s", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("memory_mib", sa.BigInteger, nullable=False),
        sa.Column("granted_mib", sa.BigInteger, nullable=False),
        sa.Column("used_mib", sa.BigInteger, nullable=False),
        sa.Column("busy", sa.Double, nullable=False),
        sa.Column("gpus", sa.LargeBinary, nullable=False),
    )


def _create(name: str, *parts: Any) -> None:
    op.create_table(name, *parts, if_not_exists=True)

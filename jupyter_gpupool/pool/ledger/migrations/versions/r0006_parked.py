"""Leases whose state is in host memory while others have their GPUs, and which namespaces allow that."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("leases", sa.Column("parked", sa.Text))
    op.add_column("namespaces", sa.Column("reclaim", sa.String(16)))

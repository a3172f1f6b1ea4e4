"""Leases that may span servers, and where the workers on the other servers are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("leases", sa.Column("spread", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("leases", sa.Column("workers_elsewhere", sa.Text))

"""Leases whose holders asked that they keep their GPUs while they are idle."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("leases", sa.Column("never_park", sa.Boolean, nullable=False, server_default=sa.false()))

"""The environment that a lease's worker runs in, and its release of PyTorch."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("leases", sa.Column("worker_environment", sa.Text))
    op.add_column("leases", sa.Column("worker_torch", sa.Text))

"""The GPU servers on which nothing new is placed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "drained_servers",
        sa.Column("server", sa.String(255), primary_key=True),
        sa.Column("since", sa.Double, nullable=False),
    )

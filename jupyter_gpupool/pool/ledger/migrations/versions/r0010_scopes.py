"""Tokens that may do less than their user."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    # What tokens could do before: whatever their user may.
    op.add_column("tokens", sa.Column("scope", sa.String(16), nullable=False, server_default="administer"))
    op.add_column("tokens", sa.Column("one_namespace", sa.Boolean, nullable=False, server_default=sa.false()))

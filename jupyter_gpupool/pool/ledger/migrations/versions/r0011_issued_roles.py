"""Members of namespaces whose role an issuer of tokens grants."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.add_column("members", sa.Column("issuer", sa.Text))

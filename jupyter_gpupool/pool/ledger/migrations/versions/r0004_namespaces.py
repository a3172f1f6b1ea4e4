"""Namespaces with their members, when a lease expires and who asked for it back, and the audit trail."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("leases", sa.Column("expires_at", sa.Double))
    op.add_column("leases", sa.Column("asked_back", sa.Text))
    op.create_table(
        "namespaces",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("limits", sa.Text, nullable=False),
        sa.Column("ceiling", sa.Text, nullable=False),
        sa.Column("weight", sa.Double, nullable=False),
        sa.Column("names_holders", sa.Boolean, nullable=False),
        sa.CheckConstraint("weight > 0", name="some_weight"),
    )
    op.create_table(
        "members",
        sa.Column(
            "namespace",
            sa.String(63),
            sa.ForeignKey("namespaces.name", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("owner", sa.String(200), primary_key=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.CheckConstraint("role IN ('view', 'use', 'administer')", name="known_role"),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
    )
    op.create_index("audit_by_time", "audit", ["at"])

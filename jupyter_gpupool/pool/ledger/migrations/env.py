"""Alembic runs this: the steps are taken on the connection, and in the transaction, of the ledger being opened."""

from __future__ import annotations

from alembic import context

from jupyter_gpupool.pool.ledger.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=context.config.attributes["version_table"],
)
context.run_migrations()

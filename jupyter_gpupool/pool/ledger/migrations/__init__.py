"""How a ledger's tables come to be, step by step: Alembic's revisions, run when a ledger is opened.

``versions/`` has one file a step. The revisions are the formats' numbers, "0001", "0002", …; the newest is
``schema.SCHEMA_VERSION``. docs/explanation/ledger.md says how a step is added.
"""

from __future__ import annotations

import threading
from pathlib import Path

from sqlalchemy import Connection, insert, inspect, select, update

from jupyter_gpupool.core.errors import LedgerUnavailable
from jupyter_gpupool.pool.ledger.tables import SCHEMA_VERSION, schema_version

_STEPS = "alembic_version"
# Alembic keeps the step that it is in globally.
_one_at_a_time = threading.Lock()


def is_current(connection: Connection) -> bool:
    """Whether the ledger has this version's tables. Raises LedgerUnavailable for those of a newer one."""
    tables = inspect(connection)
    if not tables.has_table(schema_version.name):
        return False
    found = connection.execute(select(schema_version.c.version)).scalar() or 0
    if found > SCHEMA_VERSION:
        raise LedgerUnavailable(
            f"the ledger was written by a newer version (its format is {found}, this version's is "
            f"{SCHEMA_VERSION}); update this installation, or name another ledger"
        )
    return found == SCHEMA_VERSION and tables.has_table(_STEPS)


def migrate(connection: Connection) -> None:
    """Bring a ledger of any older format, or an empty database, to this version's, in the transaction that is open.

    Raises LedgerUnavailable.
    """
    # Takes a good part of a pool's start, and is needed for the first one only.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config(attributes={"connection": connection, "version_table": _STEPS})
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    try:
        with _one_at_a_time:
            command.upgrade(config, "head")
    except CommandError as error:
        raise LedgerUnavailable(
            f"the ledger's tables cannot be brought up to date: {str(error).splitlines()[0]}"
        ) from error
    # Versions before Alembic look here, too, and leave alone what is newer than they are.
    if connection.execute(update(schema_version).values(version=SCHEMA_VERSION)).rowcount == 0:
        connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))

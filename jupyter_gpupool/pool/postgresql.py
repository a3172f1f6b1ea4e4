"""Everything about the ledger that is PostgreSQL's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, text

#: The advisory lock under which tables are created and changed: "gpupool" in ASCII.
_MIGRATING = 0x67707570_6F6F6C
_LOCK = text("SELECT pg_advisory_xact_lock(:key)")


@contextmanager
def for_migration(connection: Connection) -> Iterator[Connection]:
    """A transaction beside which no other daemon changes tables."""
    with connection.begin():
        connection.execute(_LOCK, {"key": _MIGRATING})
        yield connection

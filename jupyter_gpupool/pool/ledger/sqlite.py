"""What the ledger needs for SQLite only: its file, its settings, its error messages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, event

from jupyter_gpupool.core.errors import LedgerUnavailable

#: Milliseconds to wait for another process that writes (someone looking into the file, a backup).
BUSY_TIMEOUT_MS = 5_000

_WRITES = "gpupool_writes"

_ADVICE = (
    ("disk is full", "the disk is full; free some space"),
    ("readonly", "it is read-only; make the file and its folder writable"),
    ("locked", "another process keeps it locked; end that process"),
    ("malformed", "the file is damaged; move it away, or restore a backup"),
    ("not a database", "the file is not a ledger; move it away, or name another one"),
    ("unable to open", "it cannot be opened; check that its folder exists and is yours"),
    ("disk i/o error", "the disk does not read or write; check its space and its state"),
)


def is_sqlite(url: URL) -> bool:
    """Whether the URL is of an SQLite database."""
    return url.get_backend_name() == "sqlite"


def file_of(url: URL) -> Path | None:
    """The ledger's file; None if the ledger is in memory only."""
    if not is_sqlite(url) or url.database in (None, "", ":memory:") or str(url.database).startswith("file:"):
        return None
    return Path(str(url.database)).absolute()


def prepare_file(path: Path) -> None:
    """Create the file before SQLite does, readable by its user alone. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(descriptor).st_mode & 0o077:
            os.fchmod(descriptor, 0o600)  # -wal and -shm get the mode of the file itself
    finally:
        os.close(descriptor)


def configure(engine: Engine) -> None:
    """Install the settings, and transactions that take the write lock when they begin.

    ``synchronous=FULL``: in WAL mode, NORMAL may forget the last commits when the power fails, and a
    forgotten grant whose worker runs on another machine would be granted twice. It costs one fsync
    for each change of a lease; heartbeats are not written at all.
    """

    @event.listens_for(engine, "connect")
    def connected(dbapi_connection: Any, _record: Any) -> None:
        # The driver must not begin transactions by itself; "begin" below does.
        dbapi_connection.isolation_level = None
        cursor = dbapi_connection.cursor()
        try:
            cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.execute("PRAGMA synchronous = FULL")
            cursor.execute("PRAGMA foreign_keys = ON")
        finally:
            cursor.close()

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        # A transaction that reads first and asks for the write lock later can be refused halfway.
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def for_migration(connection: Connection) -> Iterator[Connection]:
    """A writing transaction in which a table can be rebuilt without deleting the rows that refer to it."""
    driver: Any = connection.connection.dbapi_connection
    driver.execute("PRAGMA foreign_keys = OFF")  # has no effect within a transaction
    try:
        connection = for_writing(connection)
        with connection.begin():
            yield connection
            if connection.exec_driver_sql("PRAGMA foreign_key_check").first() is not None:
                raise LedgerUnavailable(
                    "the ledger's slices and leases do not fit together; restore a backup"
                )
    finally:
        driver.execute("PRAGMA foreign_keys = ON")


def for_writing(connection: Connection) -> Connection:
    """The connection, with transactions that take the write lock when they begin."""
    return connection.execution_options(**{_WRITES: True})


def stamp(connection: Connection) -> Any:
    """A value that changes when another connection writes."""
    driver: Any = connection.connection.dbapi_connection
    return id(driver), driver.execute("PRAGMA data_version").fetchone()[0]


def advice(text: str) -> str | None:
    """What an error message of SQLite means and what to do; None for an unknown one."""
    lower = text.lower()
    return next((meaning for known, meaning in _ADVICE if known in lower), None)

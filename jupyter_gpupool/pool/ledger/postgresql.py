"""What the ledger needs for PostgreSQL only: its sessions, its locks, its error messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import URL, Connection, text

#: The advisory lock under which tables are created and changed: "gpupool" in ASCII.
_MIGRATING = 0x67707570_6F6F6C
#: The advisory lock that the leading daemon holds.
_LEADING = _MIGRATING + 1

_WAIT_FOR = text("SELECT pg_advisory_xact_lock(:key)")
_TRY = text("SELECT pg_try_advisory_lock(:key)")
_ALIVE = text("SELECT 1")

#: A daemon whose machine is gone must not keep a lock: its sessions end after about 8 s. A daemon that stalls within a
#: transaction loses that transaction. A commit is on disk when it returns, whatever the server's default is. Statements
#: are planned for the tables as they are now: a plan made for an empty ledger would scan the whole of a full one.
_SETTINGS = {
    "tcp_keepalives_idle": "3",
    "tcp_keepalives_interval": "1",
    "tcp_keepalives_count": "5",
    "idle_in_transaction_session_timeout": "5s",
    "lock_timeout": "5s",
    "synchronous_commit": "on",
    "plan_cache_mode": "force_custom_plan",
}

_ADVICE = (
    ("no space left", "the disk of the database is full; free some space"),
    ("read-only transaction", "the database is read-only; name the one that can be written"),
    ("permission denied", "its user may not do that; grant it the rights on the database"),
    ("password authentication failed", "the database does not accept its user's password"),
    ("does not exist", None),
    ("connection refused", "no database answers there; start it, or correct the address"),
    ("no such file", "no database answers there; start it, or correct the address"),
    ("timeout", "the database does not answer"),
)


def is_postgresql(url: URL) -> bool:
    """Whether the URL is of a PostgreSQL database."""
    return url.get_backend_name() == "postgresql"


def complete(url: URL) -> URL:
    """The URL with the driver and the settings of every session."""
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    given = url.query.get("options", "")
    settings = " ".join(f"-c {name}={value}" for name, value in _SETTINGS.items())
    defaults = {
        "connect_timeout": "5",
        "keepalives_idle": "3",
        "keepalives_interval": "1",
        "keepalives_count": "5",
        "application_name": "gpupool",
    }
    defaults = {name: value for name, value in defaults.items() if name not in url.query}
    return url.update_query_dict({**defaults, "options": f"{settings} {given}".strip()})


def for_reading(connection: Connection) -> Connection:
    """The connection, with read-only transactions in which all statements see the same state."""
    return connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


@contextmanager
def for_migration(connection: Connection) -> Iterator[Connection]:
    """A transaction during which no other daemon changes tables."""
    with connection.begin():
        connection.execute(_WAIT_FOR, {"key": _MIGRATING})
        yield connection


def try_to_lead(connection: Connection) -> bool:
    """Try to take the leader's lock for this session; returns whether it holds it."""
    return bool(connection.execute(_TRY, {"key": _LEADING}).scalar())


def is_alive(connection: Connection) -> bool:
    """Whether the session answers. Raises SQLAlchemyError once the session, and its lock, are gone."""
    return connection.execute(_ALIVE).scalar() == 1


def advice(text: str) -> str | None:
    """What an error message of PostgreSQL means and what to do; None for an unknown one."""
    lower = text.lower()
    return next((meaning for known, meaning in _ADVICE if known in lower), None)

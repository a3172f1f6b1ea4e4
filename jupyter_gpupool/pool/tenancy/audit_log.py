"""The audit log: who requested what, and the outcome. Entries are only added, and deleted once they are old.

An entry is written in the transaction that it describes. A refusal has no transaction and is written a moment later.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from sqlalchemy import bindparam, delete, insert, select

from jupyter_gpupool.pool.ledger.ledger import Transaction
from jupyter_gpupool.pool.ledger.tables import audit

#: The acting user, if it is not the one whom the action concerns: an administrator, for example.
acting: ContextVar[str] = ContextVar("acting", default="")

_MAX_OUTCOME_CHARS = 300

_ADD = insert(audit)
_FIND = (
    select(audit)
    .where(audit.c.at >= bindparam("since"))
    .order_by(audit.c.id.desc())
    .limit(bindparam("newest"))
)
_PRUNE = delete(audit).where(audit.c.at < bindparam("before"))


@dataclass(frozen=True)
class Entry:
    """One entry. ``actor``: empty for the pool itself. ``subject``: the id of a lease or a token, or a name."""

    at: float
    action: str
    subject: str
    outcome: str = ""
    namespace: str = ""
    actor: str = ""


def write(tx: Transaction, entries: Sequence[Entry]) -> None:
    """Add entries."""
    if entries:
        tx.append(_ADD, [{**vars(entry), "outcome": entry.outcome[:_MAX_OUTCOME_CHARS]} for entry in entries])


def read(tx: Transaction, since: float = 0.0, newest: int = 200) -> list[Entry]:
    """The newest entries since then (seconds since the epoch), oldest first."""
    rows = tx.execute(_FIND, {"since": since, "newest": newest}).all()
    return [Entry(**{k: v for k, v in row._mapping.items() if k != "id"}) for row in rows[::-1]]


def prune(tx: Transaction, before: float) -> None:
    """Delete the entries before that time, in seconds since the epoch."""
    tx.execute(_PRUNE, {"before": before})

"""Who asked for what, and what came of it: a table that is only ever added to, until its entries are old.

Entries are written in the transaction that does what they tell; a refusal, which has none, a moment later.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from sqlalchemy import bindparam, delete, insert, select

from .ledger import Transaction
from .schema import audit

#: Who is acting, where that is somebody else than whom it is about: an administrator, say.
acting: ContextVar[str] = ContextVar("acting", default="")

_LONGEST = 300
MOST = 1000

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
    """``actor`` is empty where it was the pool by itself; ``subject`` is the id of a lease or a token, or a name."""

    at: float
    action: str
    subject: str
    outcome: str = ""
    namespace: str = ""
    actor: str = ""


def write(tx: Transaction, entries: Sequence[Entry]) -> None:
    if entries:
        tx.append(_ADD, [{**vars(entry), "outcome": entry.outcome[:_LONGEST]} for entry in entries])


def read(tx: Transaction, since: float = 0.0, newest: int = 200) -> list[Entry]:
    """The newest entries since then (seconds since the epoch), oldest first."""
    rows = tx.execute(_FIND, {"since": since, "newest": newest}).all()
    return [Entry(**{k: v for k, v in row._mapping.items() if k != "id"}) for row in rows[::-1]]


def prune(tx: Transaction, before: float) -> None:
    tx.execute(_PRUNE, {"before": before})

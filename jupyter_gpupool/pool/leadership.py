"""Which of several daemons on one PostgreSQL ledger leads: one grants, the others answer questions.

The lead is an advisory lock of a session that does nothing else; PostgreSQL gives it back when that session ends,
however it ends. Whoever gets it begins a new epoch, in a transaction that waits for the last one of the leader
before. Every writing transaction of a leader asks for its own epoch first (``Ledger.epoch``). So one that has lost
the lead, and does not know it yet, cannot write anything once another one leads.
"""

from __future__ import annotations

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from . import postgresql
from . import statements as sql
from .errors import LedgerUnavailable
from .ledger import Ledger

#: The epoch of a daemon that must not write.
FOLLOWING = 0


class Leadership:
    """One daemon's part in it; ``name`` tells people where it answers. Used by one thread at a time."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self._ledger = ledger
        self._name = name
        self._session: Connection | None = None
        ledger.epoch = FOLLOWING
        self.leader = ""  # where the one answers that was last known to lead

    def take(self) -> bool:
        """Lead from now on, unless another daemon does. Raises LedgerUnavailable."""
        try:
            if self._session is None:
                self._session = self._ledger.session()
            if not postgresql.try_to_lead(self._session):
                self.leader = str(self._session.execute(sql.FIND_LEADER).one().leader)
                return False
            self._ledger.epoch = self._session.execute(sql.TAKE_LEAD, {"name": self._name}).scalar_one()
        except SQLAlchemyError as error:
            self.give_up()
            raise LedgerUnavailable(f"the ledger {self._ledger.name} does not say who leads") from error
        self.leader = self._name
        return True

    def keep(self) -> bool:
        """Whether this one still leads; once it does not, it can write nothing."""
        try:
            if self._session is not None and postgresql.is_alive(self._session):
                return True
        except SQLAlchemyError:
            pass
        self.give_up()
        return False

    def give_up(self) -> None:
        """Write nothing more, and let another one lead."""
        self._ledger.epoch = FOLLOWING
        session, self._session = self._session, None
        if session is not None:
            session.invalidate()  # closed rather than kept for others: with it ends the lock
            session.close()

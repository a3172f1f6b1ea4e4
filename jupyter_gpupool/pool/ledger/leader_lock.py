"""Which of several daemons on one PostgreSQL ledger leads: the leader grants, the others answer queries.

The lead is an advisory lock of a session that does nothing else. PostgreSQL releases it however that session ends.
A new leader begins a new epoch, in a transaction that waits for the last one of the leader before. Every writing
transaction checks its leader's epoch first (``Ledger.epoch``). So a daemon that has lost the lead without noticing
cannot write once another daemon leads.
"""

from __future__ import annotations

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from jupyter_gpupool.core.errors import LedgerUnavailable

from . import postgresql
from . import queries as sql
from .ledger import Ledger

#: The epoch of a daemon that must not write.
FOLLOWING = 0


class Leadership:
    """One daemon's part in the election. ``name``: its address, for people. Used by one thread at a time."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self._ledger = ledger
        self._name = name
        self._session: Connection | None = None
        ledger.epoch = FOLLOWING
        self.leader = ""  # the address of the last known leader

    def take(self) -> bool:
        """Try to become the leader; returns whether this daemon leads. Raises LedgerUnavailable."""
        try:
            if self._session is None:
                self._session = self._ledger.session()
            if not postgresql.try_to_lead(self._session):
                self.leader = str(self._session.execute(sql.FIND_LEADER).one().leader)
                return False
            self._ledger.epoch = self._session.execute(sql.TAKE_LEAD, {"name": self._name}).scalar_one()
        except SQLAlchemyError as error:
            self.give_up()
            raise LedgerUnavailable(
                f"the ledger {self._ledger.name} cannot be asked which daemon leads"
            ) from error
        self.leader = self._name
        return True

    def keep(self) -> bool:
        """Whether this daemon still leads. If not, it cannot write any more."""
        try:
            if self._session is not None and postgresql.is_alive(self._session):
                return True
        except SQLAlchemyError:
            pass
        self.give_up()
        return False

    def give_up(self) -> None:
        """Stop writing, and let another daemon lead."""
        self._ledger.epoch = FOLLOWING
        session, self._session = self._session, None
        if session is not None:
            session.invalidate()  # closes it instead of returning it to the pool, which releases the lock
            session.close()

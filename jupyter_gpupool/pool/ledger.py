"""The pool's memory: leases, their slices and what is granted of each GPU, in a database.

One writing transaction for each change, durable before anybody acts on it. Nothing here decides;
the manager does. Nothing here is SQLite's own either; :mod:`.sqlite` has that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from . import migrations, postgresql, sqlite
from . import statements as sql
from .errors import LedgerUnavailable, NotLeading
from .spans import span
from .statements import EVERY, HOLDING, LIVE
from .transaction import Transaction
from .view import View
from .viewing import Viewed, read_view

__all__ = ["EVERY", "HOLDING", "LIVE", "Ledger", "Transaction", "Viewed"]


class Ledger:
    """The database behind a SQLAlchemy URL, created where it does not exist yet.

    Every error of the database becomes :class:`LedgerUnavailable`: one line, nothing changed.
    Usable from one thread at a time.
    """

    def __init__(self, url: str) -> None:
        try:
            self._url: URL = make_url(url)
        except ArgumentError as error:
            raise LedgerUnavailable(
                "the ledger's address is not a database URL; one looks like sqlite:////path/to/ledger.sqlite, "
                "or postgresql://user:password@host/database"
            ) from error
        #: Whether several daemons may have it open, of which one leads.
        self.shared = postgresql.is_postgresql(self._url)
        #: Of those on a shared ledger: the epoch in which this one leads; 0 for one that must not write.
        self.epoch: int | None = None
        self.path: Path | None = sqlite.file_of(self._url)
        self._view: View | None = None
        self._together: Viewed | None = None
        self._engine = self._open()
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The ledger as a person knows it: a file, or a URL without its password."""
        return str(self.path) if self.path else self._url.render_as_string(hide_password=True)

    @contextmanager
    def transaction(self) -> Iterator[Viewed]:
        """A writing transaction: committed when the block ends, undone when it raises."""
        if self._together is not None:
            with self._part_of(self._together) as part:
                yield part
            return
        tx: Viewed | None = None
        try:
            with self._errors(), self._engine.connect() as connection:
                if sqlite.is_sqlite(self._url):
                    connection = sqlite.for_writing(connection)
                with connection.begin() as transaction:
                    tx = self._viewed(connection, self._count_change(connection) if self.shared else None)
                    yield tx
                    with span("commit"):
                        tx.flush()
                        transaction.commit()
        except BaseException as error:
            # Who cannot tell whether a commit took place has to look.
            sure = tx is not None and not tx.stale and not isinstance(error, LedgerUnavailable)
            if tx is not None and sure:
                tx.view.undo()
            self._view = tx.view if tx is not None and sure else None
            raise
        self._view = None if tx.stale else tx.view

    @contextmanager
    def together(self, new_ids: Sequence[str] = ()) -> Iterator[None]:
        """One writing transaction for all that begin within, so that they cost one commit. One that raises is undone
        by itself; nothing of any of them is durable before the block has ended. Raises as ``transaction`` does, also
        where one cannot be undone by itself: then none has happened. ``new_ids``: of leases that will be asked for
        within, and that the ledger hardly has."""
        with self.transaction() as tx:
            tx.look_for(new_ids)
            self._together = tx
            try:
                yield
            finally:
                self._together = None

    @contextmanager
    def _part_of(self, tx: Viewed) -> Iterator[Viewed]:
        mark = tx.mark()
        try:
            yield tx
        except LedgerUnavailable:
            raise
        except Exception as error:
            if not tx.undo(mark):
                raise LedgerUnavailable("a change could not be undone by itself") from error
            raise

    @contextmanager
    def reading(self, everything: bool = False) -> Iterator[Transaction]:
        """A transaction that sees one state of the ledger and must not write. ``everything``: it is to read all that
        lives, which is then kept for those after it."""
        if self._together is not None:
            yield self._together
            return
        with self._errors(), self._engine.connect() as connection:
            if self.shared:
                connection = postgresql.for_reading(connection)
            with connection.begin():
                view = self._view if self._is_current(connection, self._view) else None
                if view is None and everything and not (self.shared and self.epoch == 0):
                    stamp = self._stamp(connection)
                    view = self._view = read_view(Transaction(connection))
                    view.stamp = stamp
                yield Transaction(connection) if view is None else Viewed(connection, view)

    @contextmanager
    def rehearsal(self) -> Iterator[Viewed]:
        """A transaction that is undone in any case; a daemon that does not lead may have one."""
        if self._together is not None:
            mark = self._together.mark()
            yield self._together
            if not self._together.undo(mark):
                raise LedgerUnavailable("a rehearsal could not be undone by itself")
            return
        with self._errors(), self._engine.connect() as connection:
            if sqlite.is_sqlite(self._url):
                connection = sqlite.for_writing(connection)
            with connection.begin() as transaction:
                tx = self._viewed(connection, None)
                try:
                    yield tx
                finally:
                    transaction.rollback()
                    tx.view.undo()
                    self._view = None if tx.stale else tx.view

    # -- the view

    def verify(self) -> str:
        """How the view differs from the ledger; empty where it does not, or there is none."""
        with self.transaction() as tx:
            return tx.view.differs(read_view(Transaction(tx._connection)))

    def _viewed(self, connection: Connection, count: int | None) -> Viewed:
        """A transaction on the view, read anew if somebody else has written. ``count`` is that of this transaction,
        where the database counts them."""
        view = self._view
        if count is not None:
            current = view is not None and count == view.stamp + 1
        else:
            current = self._is_current(connection, view)
        if view is None or not current:
            view = read_view(Transaction(connection))
        view.stamp = count if count is not None else self._stamp(connection)
        self._view = None  # until this transaction has ended as it should
        return Viewed(connection, view)

    def _is_current(self, connection: Connection, view: View | None) -> bool:
        if view is None or (self.shared and self.epoch == 0):
            return False
        # Nobody but the one that leads writes.
        return bool(self.shared and self.epoch) or view.stamp == self._stamp(connection)

    def _stamp(self, connection: Connection) -> Any:
        """Differs after somebody else has written."""
        if self.shared:
            return connection.execute(sql.FIND_CHANGES).scalar()
        return sqlite.stamp(connection)

    def session(self) -> Connection:
        """A connection for locks, without transactions. Raises SQLAlchemyError."""
        return self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def check(self) -> None:
        """Raise :class:`LedgerUnavailable` unless a change can be made durable right now."""
        with self.transaction() as tx:
            tx.touch()

    def close(self) -> None:
        self._engine.dispose()

    def _count_change(self, connection: Connection) -> int:
        """Be the only writer, as BEGIN IMMEDIATE has it in SQLite. Raises NotLeading once another daemon leads."""
        if self.epoch is None:
            return connection.execute(sql.COUNT_CHANGE).scalar_one()
        count = connection.execute(sql.COUNT_LEADERS_CHANGE, {"of_epoch": self.epoch}).scalar()
        if count is None:
            raise NotLeading("this server does not lead the pool; ask another one of it")
        return count

    def _prepare(self) -> None:
        """Create the tables, bring older ones up to date, or see that they are ours."""
        with self.reading() as tx:
            if tx.is_current():
                return
        backend = sqlite if sqlite.is_sqlite(self._url) else postgresql
        with (
            self._errors(),
            self._engine.connect() as connection,
            backend.for_migration(connection) as tables,
        ):
            if not migrations.is_current(tables):  # else another process was faster
                migrations.migrate(tables)

    def _open(self) -> Engine:
        try:
            if self.path:
                sqlite.prepare_file(self.path)
            url = postgresql.complete(self._url) if self.shared else self._url
            engine = create_engine(url, hide_parameters=True)
        except OSError as error:
            why = error.strerror or str(error)
            raise LedgerUnavailable(f"the ledger {self.name} cannot be opened: {why}") from error
        except ModuleNotFoundError as error:
            what = "pip install 'jupyter_gpupool[postgresql]'" if self.shared else str(error)
            raise LedgerUnavailable(f"no driver for the ledger {self.name}: {what}") from error
        except ArgumentError as error:
            raise LedgerUnavailable(f"no driver for the ledger {self.name}: {error}") from error
        if sqlite.is_sqlite(self._url):
            sqlite.configure(engine)
        return engine

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            detail = str(getattr(error, "orig", None) or error).splitlines()[0]
            meaning = (postgresql if self.shared else sqlite).advice(detail)
            line = f"the ledger {self.name} cannot be used: {meaning or detail}"
            raise LedgerUnavailable(line) from error

"""The pool's memory: leases, their slices and what is granted of each GPU, in a database.

Each change is one writing transaction, durable before anybody acts on it. The manager decides; the ledger records.
What only SQLite needs is in :mod:`.sqlite`, what only PostgreSQL needs in :mod:`.postgresql`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from jupyter_gpupool.core.errors import LedgerUnavailable, NotLeading
from jupyter_gpupool.core.tracing import span

from . import migrations, postgresql, sqlite
from . import queries as sql
from .buffered_transaction import BufferedTransaction, read_live_leases
from .live_leases import LiveLeases
from .queries import EVERY, HOLDING, LIVE, WITH_WORKER
from .transaction import Transaction

__all__ = ["EVERY", "HOLDING", "LIVE", "WITH_WORKER", "BufferedTransaction", "Ledger", "Transaction"]


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
        self._live: LiveLeases | None = None
        self._batch: BufferedTransaction | None = None
        self._engine = self._open()
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The ledger's name in messages: a file, or a URL without its password."""
        return str(self.path) if self.path else self._url.render_as_string(hide_password=True)

    @contextmanager
    def transaction(self) -> Iterator[BufferedTransaction]:
        """A writing transaction: committed when the block ends, undone when it raises."""
        if self._batch is not None:
            with self._part_of(self._batch) as part:
                yield part
            return
        tx: BufferedTransaction | None = None
        try:
            with self._errors(), self._engine.connect() as connection:
                if sqlite.is_sqlite(self._url):
                    connection = sqlite.for_writing(connection)
                with connection.begin() as transaction:
                    tx = self._buffered(connection, self._count_change(connection) if self.shared else None)
                    yield tx
                    with span("commit"):
                        tx.flush()
                        transaction.commit()
        except BaseException as error:
            # If it is unknown whether the commit took place, the live leases are read again.
            sure = tx is not None and not tx.stale and not isinstance(error, LedgerUnavailable)
            if tx is not None and sure:
                tx.live.undo()
            self._live = tx.live if tx is not None and sure else None
            raise
        self._live = None if tx.stale else tx.live

    @contextmanager
    def together(self, new_ids: Sequence[str] = ()) -> Iterator[None]:
        """Batch all transactions that begin within the block into one, so that they cost one commit.

        A transaction that raises is undone by itself. Nothing is durable before the block has ended.
        ``new_ids``: IDs of leases that the block will look for and that are probably not in the ledger yet.
        Raises what ``transaction`` raises. Raises LedgerUnavailable if a transaction cannot be undone by itself;
        then none of them has taken place.
        """
        with self.transaction() as tx:
            tx.look_for(new_ids)
            self._batch = tx
            try:
                yield
            finally:
                self._batch = None

    @contextmanager
    def _part_of(self, tx: BufferedTransaction) -> Iterator[BufferedTransaction]:
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
        """A transaction that sees one state of the ledger and must not write.

        ``everything``: read all live leases, and keep them in memory for later transactions.
        """
        if self._batch is not None:
            yield self._batch
            return
        with self._errors(), self._engine.connect() as connection:
            if self.shared:
                connection = postgresql.for_reading(connection)
            with connection.begin():
                live = self._live if self._is_current(connection, self._live) else None
                if live is None and everything and not (self.shared and self.epoch == 0):
                    stamp = self._stamp(connection)
                    live = self._live = read_live_leases(Transaction(connection))
                    live.stamp = stamp
                yield Transaction(connection) if live is None else BufferedTransaction(connection, live)

    @contextmanager
    def rehearsal(self) -> Iterator[BufferedTransaction]:
        """A transaction that is always undone. Daemons that do not lead may use it, too."""
        if self._batch is not None:
            mark = self._batch.mark()
            yield self._batch
            if not self._batch.undo(mark):
                raise LedgerUnavailable("a rehearsal could not be undone by itself")
            return
        with self._errors(), self._engine.connect() as connection:
            if sqlite.is_sqlite(self._url):
                connection = sqlite.for_writing(connection)
            with connection.begin() as transaction:
                tx = self._buffered(connection, None)
                try:
                    yield tx
                finally:
                    transaction.rollback()
                    tx.live.undo()
                    self._live = None if tx.stale else tx.live

    # -- the live leases

    def verify(self) -> str:
        """How the live leases in memory differ from the database; empty if they do not."""
        with self.transaction() as tx:
            return tx.live.difference_from(read_live_leases(Transaction(tx._connection)))

    def _buffered(self, connection: Connection, count: int | None) -> BufferedTransaction:
        """A transaction on the live leases, which are read again if another process has written.

        ``count``: the number of this transaction, if the database counts them.
        """
        live = self._live
        if count is not None:
            current = live is not None and count == live.stamp + 1
        else:
            current = self._is_current(connection, live)
        if live is None or not current:
            live = read_live_leases(Transaction(connection))
        live.stamp = count if count is not None else self._stamp(connection)
        self._live = None  # until this transaction has succeeded
        return BufferedTransaction(connection, live)

    def _is_current(self, connection: Connection, live: LiveLeases | None) -> bool:
        if live is None or (self.shared and self.epoch == 0):
            return False
        # Only the leader writes.
        return bool(self.shared and self.epoch) or live.stamp == self._stamp(connection)

    def _stamp(self, connection: Connection) -> Any:
        """A value that changes when another process writes."""
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
        """Close the connections to the database."""
        self._engine.dispose()

    def _count_change(self, connection: Connection) -> int:
        """Become the only writer, as BEGIN IMMEDIATE does in SQLite. Raises NotLeading once another daemon leads."""
        if self.epoch is None:
            return int(connection.execute(sql.COUNT_CHANGE).scalar_one())
        count = connection.execute(sql.COUNT_LEADERS_CHANGE, {"of_epoch": self.epoch}).scalar()
        if count is None:
            raise NotLeading("this server does not lead the pool; ask another one of it")
        return int(count)

    def _prepare(self) -> None:
        """Create the tables, migrate older ones, or check that they are the pool's."""
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

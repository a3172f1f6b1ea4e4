"""The pool's memory: leases, their slices and what is granted of each GPU, in a database.

One writing transaction for each change, durable before anybody acts on it. Nothing here decides;
the manager does. Nothing here is SQLite's own either; :mod:`.sqlite` has that.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, CursorResult, Engine, Executable, Update, create_engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from . import migrations, postgresql, sqlite
from . import statements as sql
from .errors import LedgerUnavailable, NotLeading
from .limits import Holding
from .models import Lease, LeaseState, Server, Slice, WorkerAddress
from .schema import lease_from, lease_row, slice_from, slice_row
from .spans import span
from .statements import EVERY, HOLDING, LIVE

__all__ = ["EVERY", "HOLDING", "LIVE", "Ledger", "Transaction"]


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
    def transaction(self) -> Iterator[Transaction]:
        """A writing transaction: committed when the block ends, undone when it raises."""
        with self._errors(), self._engine.connect() as connection:
            if sqlite.is_sqlite(self._url):
                connection = sqlite.for_writing(connection)
            with connection.begin() as transaction:
                if self.shared:
                    self._be_the_only_writer(connection)
                yield Transaction(connection)
                with span("commit"):
                    transaction.commit()

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """A transaction that sees one state of the ledger and must not write."""
        with self._errors(), self._engine.connect() as connection:
            if self.shared:
                connection = postgresql.for_reading(connection)
            with connection.begin():
                yield Transaction(connection)

    @contextmanager
    def rehearsal(self) -> Iterator[Transaction]:
        """A transaction that is undone in any case; a daemon that does not lead may have one."""
        with self._errors(), self._engine.connect() as connection:
            if sqlite.is_sqlite(self._url):
                connection = sqlite.for_writing(connection)
            with connection.begin() as transaction:
                try:
                    yield Transaction(connection)
                finally:
                    transaction.rollback()

    def session(self) -> Connection:
        """A connection for locks, without transactions. Raises SQLAlchemyError."""
        return self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def check(self) -> None:
        """Raise :class:`LedgerUnavailable` unless a change can be made durable right now."""
        with self.transaction() as tx:
            tx.touch()

    def close(self) -> None:
        self._engine.dispose()

    def _be_the_only_writer(self, connection: Connection) -> None:
        """As BEGIN IMMEDIATE has it in SQLite. Raises NotLeading once another daemon has taken the lead."""
        if self.epoch is None:
            connection.execute(sql.COUNT_CHANGE)
        elif connection.execute(sql.COUNT_LEADERS_CHANGE, {"of_epoch": self.epoch}).scalar() is None:
            raise NotLeading("this server does not lead the pool; ask another one of it")

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


class Transaction:
    """What can be read and changed within one transaction of the ledger."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._execute = connection.execute

    def execute(self, statement: Executable, values: Any = None) -> CursorResult[Any]:
        """For tables that are not about leases."""
        return self._execute(statement, values)

    # -- reading ------------------------------------------------------------------------------

    def is_current(self) -> bool:
        """Whether the tables are this version's. Raises LedgerUnavailable for those of a newer one."""
        return migrations.is_current(self._connection)

    def lease(self, lease_id: str) -> Lease | None:
        row = self._execute(sql.FIND_LEASE, {"lease_id": lease_id}).one_or_none()
        return self._with_slices([row])[0] if row else None

    def leases(
        self,
        states: tuple[LeaseState, ...] = LIVE,
        owner: str | None = None,
        newest: int | None = None,
        managed: Sequence[str] = (),
    ) -> list[Lease]:
        """Leases in order of arrival, at most the ``newest`` so many; of ``owner`` and in ``managed`` namespaces."""
        query = sql.find_leases(states, owner is not None, bool(managed), newest is not None)
        given = {"wanted_owner": owner, "newest": newest, "managed": list(managed) or None}
        rows = self._execute(query, {name: value for name, value in given.items() if value is not None})
        return self._with_slices(rows.all()[::-1])

    def granted_mib(self) -> dict[str, int]:
        """What is granted now, in MiB by GPU uuid, of every GPU that the ledger ever saw."""
        return {row.uuid: row.used_mib for row in self._execute(sql.GRANTED_MIB)}

    def held(self) -> dict[tuple[str, str], Holding]:
        """What is held now, by namespace and owner."""
        return {
            (row.namespace, row.owner): Holding(int(row.memory_mib), float(row.gpus), row.leases)
            for row in self._execute(sql.HELD)
        }

    # -- changing -----------------------------------------------------------------------------

    def touch(self) -> None:
        """Write without changing anything."""
        self._execute(sql.TOUCH_VERSION)

    def record_gpus(self, servers: Sequence[Server]) -> None:
        """Remember every GPU; what was granted of one before stays granted."""
        known = {row.uuid: row for row in self._execute(sql.GPUS)}
        for gpu in (gpu for server in servers for gpu in server.gpus):
            row = known.get(gpu.uuid)
            if row is None:
                values = {"uuid": gpu.uuid, "server": gpu.server, "memory_mib": gpu.memory_mib, "used_mib": 0}
                self._execute(sql.ADD_GPU, values)
                continue
            # A GPU that came back smaller keeps what is granted of it; placement goes by its new size.
            memory = max(gpu.memory_mib, row.used_mib)
            if (row.server, row.memory_mib) != (gpu.server, memory):
                self._execute(sql.SET_GPU, {"gpu": gpu.uuid, "at_server": gpu.server, "memory": memory})

    def add(self, lease: Lease) -> None:
        """Record a request that is QUEUED."""
        self._execute(sql.ADD_LEASE, lease_row(lease))

    def grant(self, lease_id: str, pieces: Sequence[Slice], at: float, until: float | None = None) -> None:
        """QUEUED to GRANTED, with its slices. The database refuses what would exceed a GPU."""
        seq = self._execute(sql.QUEUED_SEQ, {"lease_id": lease_id}).scalar()
        if seq is None:
            raise LedgerUnavailable(f"the ledger has no lease {lease_id} that is queued")
        self._execute(sql.GRANT, {"of_seq": seq, "at": at, "until": until})
        for piece in pieces:
            self._execute(sql.ADD_SLICE, slice_row(seq, piece))
            self._use(piece.gpu_uuid, piece.memory_mib)

    def activate(self, lease_id: str, worker: WorkerAddress) -> None:
        """GRANTED (or ACTIVE, with a worker found again) to ACTIVE."""
        self._once(sql.ACTIVATE, f"lease {lease_id} that holds anything", lease_id=lease_id, **asdict(worker))

    def resize(self, lease: Lease, pieces: Sequence[Slice]) -> None:
        """Give a lease that holds slices other amounts of the same GPUs' memory."""
        for before, piece in zip(lease.slices, pieces, strict=True):
            if piece == before:
                continue
            self._once(
                sql.SET_SLICE,
                f"slice of {piece.gpu_uuid} for lease {lease.id}",
                lease_id=lease.id,
                gpu=piece.gpu_uuid,
                before=before.memory_mib,
                memory=piece.memory_mib,
            )
            self._use(piece.gpu_uuid, piece.memory_mib - before.memory_mib)

    def set_terms(self, lease: Lease) -> None:
        """Record when a live lease expires, and who asked for it back."""
        asked = json.dumps([asdict(one) for one in lease.asked_back]) if lease.asked_back else None
        self._once(
            sql.SET_TERMS,
            f"lease {lease.id} that lives",
            lease_id=lease.id,
            until=lease.expires_at,
            asked=asked,
        )

    def end(self, lease: Lease, state: LeaseState, reason: str, at: float) -> None:
        """From any live state to one that has ended; its slices are free from here on."""
        self._once(
            sql.END,
            f"lease {lease.id} in state {lease.state.value}",
            lease_id=lease.id,
            from_state=lease.state.value,
            to_state=state.value,
            why=reason,
            at=at,
        )
        if lease.state.holds:
            for piece in lease.slices:
                self._use(piece.gpu_uuid, -piece.memory_mib)

    def prune(self, before: float) -> int:
        """Forget the leases that ended before that time (seconds since the epoch); how many."""
        self._execute(sql.PRUNE_SLICES, {"before": before})
        return self._execute(sql.PRUNE_LEASES, {"before": before}).rowcount

    # -- within -------------------------------------------------------------------------------

    def _with_slices(self, rows: Sequence[Any]) -> list[Lease]:
        placed = [row.seq for row in rows if row.granted_at is not None]
        pieces: dict[int, list[Slice]] = defaultdict(list)
        for start in range(0, len(placed), 500):  # databases limit the parameters of one statement
            some = placed[start : start + 500]
            one = len(some) == 1
            found = self._execute(
                sql.SLICES_OF if one else sql.SLICES_OF_MANY, {"seq": some[0]} if one else {"seqs": some}
            )
            for row in found:
                pieces[row.lease].append(slice_from(row))
        return [lease_from(row, pieces[row.seq]) for row in rows]

    def _use(self, gpu_uuid: str, more_mib: int) -> None:
        self._once(sql.USE_GPU, f"GPU {gpu_uuid}", gpu=gpu_uuid, more_mib=more_mib)

    def _once(self, statement: Update, what: str, **values: Any) -> None:
        """Change exactly one row, or the transaction fails: the ledger is not what its reader took it for."""
        if self._execute(statement, values).rowcount != 1:
            raise LedgerUnavailable(f"the ledger has no {what}")

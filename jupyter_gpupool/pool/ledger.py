"""The pool's memory: leases, their slices and what is granted of each GPU, in a database.

One writing transaction for each change, durable before anybody acts on it. Nothing here decides;
the manager does. Nothing here is SQLite's own either; :mod:`.sqlite` has that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, delete, func, insert, make_url, select, update
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from . import sqlite
from .errors import LedgerUnavailable
from .models import Lease, LeaseState, Server, Slice, WorkerAddress
from .schema import (
    SCHEMA_VERSION,
    gpus,
    lease_from,
    lease_row,
    leases,
    metadata,
    schema_version,
    slice_from,
    slice_row,
    slices,
)

HOLDING = tuple(state for state in LeaseState if state.holds)
LIVE = tuple(state for state in LeaseState if not state.ended)


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
                "the ledger's address is not a database URL; one looks like sqlite:////path/to/ledger.sqlite"
            ) from error
        self.path: Path | None = sqlite.file_of(self._url)
        self._engine = self._open()
        try:
            with self.transaction() as tx:
                tx.prepare()
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
            with connection.begin():
                if not sqlite.is_sqlite(self._url):
                    # One writer at a time, as BEGIN IMMEDIATE has it there.
                    connection.execute(select(schema_version.c.version).with_for_update())
                yield Transaction(connection)

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """A transaction that sees one state of the ledger and must not write."""
        with self._errors(), self._engine.connect() as connection, connection.begin():
            yield Transaction(connection)

    def check(self) -> None:
        """Raise :class:`LedgerUnavailable` unless a change can be made durable right now."""
        with self.transaction() as tx:
            tx.touch()

    def close(self) -> None:
        self._engine.dispose()

    def _open(self) -> Engine:
        try:
            if self.path:
                sqlite.prepare_file(self.path)
            engine = create_engine(self._url, hide_parameters=True)
        except OSError as error:
            why = error.strerror or str(error)
            raise LedgerUnavailable(f"the ledger {self.name} cannot be opened: {why}") from error
        except (ModuleNotFoundError, ArgumentError) as error:
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
            meaning = sqlite.advice(detail) if sqlite.is_sqlite(self._url) else None
            line = f"the ledger {self.name} cannot be used: {meaning or detail}"
            raise LedgerUnavailable(line) from error


class Transaction:
    """What can be read and changed within one transaction of the ledger."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    # -- reading ------------------------------------------------------------------------------

    def lease(self, lease_id: str) -> Lease | None:
        found = self._leases(leases.c.id == lease_id)
        return found[0] if found else None

    def leases(
        self, states: Collection[LeaseState] = LIVE, owner: str | None = None, newest: int | None = None
    ) -> list[Lease]:
        """Leases in order of arrival, at most the ``newest`` so many."""
        conditions: list[Any] = [leases.c.state.in_([state.value for state in states])]
        if owner is not None:
            conditions.append(leases.c.owner == owner)
        return self._leases(*conditions, newest=newest)

    def granted_mib(self) -> dict[str, int]:
        """What is granted now, in MiB by GPU uuid, of every GPU that the ledger ever saw."""
        rows = self._connection.execute(select(gpus.c.uuid, gpus.c.used_mib))
        return {row.uuid: row.used_mib for row in rows}

    def held_gpus(self) -> dict[str, float]:
        """How many whole GPUs each namespace's slices amount to now."""
        rows = self._connection.execute(
            select(leases.c.namespace, slices.c.memory_mib, slices.c.total_mib)
            .join(slices, slices.c.lease == leases.c.seq)
            .where(leases.c.state.in_([state.value for state in HOLDING]))
        )
        held: dict[str, float] = defaultdict(float)
        for row in rows:
            held[row.namespace] += row.memory_mib / row.total_mib
        return dict(held)

    # -- changing -----------------------------------------------------------------------------

    def prepare(self) -> None:
        """Create the tables, or see that they are ours."""
        metadata.create_all(self._connection)
        found = self._connection.execute(select(func.max(schema_version.c.version))).scalar()
        if found is None:
            self._connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))
        elif found > SCHEMA_VERSION:
            raise LedgerUnavailable(
                f"the ledger was written by a newer version (its format is {found}, this version's is "
                f"{SCHEMA_VERSION}); update this installation, or name another ledger"
            )

    def touch(self) -> None:
        """Write without changing anything."""
        self._connection.execute(update(schema_version).values(version=schema_version.c.version))

    def record_gpus(self, servers: Sequence[Server]) -> None:
        """Remember every GPU; what was granted of one before stays granted."""
        known = {row.uuid: row for row in self._connection.execute(select(gpus))}
        for gpu in (gpu for server in servers for gpu in server.gpus):
            row = known.get(gpu.uuid)
            if row is None:
                values = {"uuid": gpu.uuid, "server": gpu.server, "memory_mib": gpu.memory_mib, "used_mib": 0}
                self._connection.execute(insert(gpus).values(values))
                continue
            # A GPU that came back smaller keeps what is granted of it; placement goes by its new size.
            memory = max(gpu.memory_mib, row.used_mib)
            if (row.server, row.memory_mib) != (gpu.server, memory):
                self._connection.execute(
                    update(gpus).where(gpus.c.uuid == gpu.uuid).values(server=gpu.server, memory_mib=memory)
                )

    def add(self, lease: Lease) -> None:
        """Record a request that is QUEUED."""
        self._connection.execute(insert(leases).values(lease_row(lease)))

    def grant(self, lease_id: str, pieces: Sequence[Slice], at: float) -> None:
        """QUEUED to GRANTED, with its slices. The database refuses what would exceed a GPU."""
        seq = self._move(lease_id, [LeaseState.QUEUED], state=LeaseState.GRANTED.value, granted_at=at)
        for piece in pieces:
            self._connection.execute(insert(slices).values(slice_row(seq, piece)))
            self._use(piece.gpu_uuid, piece.memory_mib)

    def activate(self, lease_id: str, worker: WorkerAddress) -> None:
        """GRANTED (or ACTIVE, with a worker found again) to ACTIVE."""
        self._move(
            lease_id,
            HOLDING,
            state=LeaseState.ACTIVE.value,
            worker_host=worker.host,
            worker_port=worker.port,
            worker_pid=worker.pid,
            worker_created=worker.created,
        )

    def end(self, lease: Lease, state: LeaseState, reason: str, at: float) -> None:
        """From any live state to one that has ended; its slices are free from here on."""
        self._move(lease.id, [lease.state], state=state.value, reason=reason, ended_at=at)
        if lease.state.holds:
            for piece in lease.slices:
                self._use(piece.gpu_uuid, -piece.memory_mib)

    def prune(self, before: float) -> int:
        """Forget the leases that ended before that time (seconds since the epoch); how many."""
        old = select(leases.c.seq).where(leases.c.ended_at < before)
        self._connection.execute(delete(slices).where(slices.c.lease.in_(old)))
        return self._connection.execute(delete(leases).where(leases.c.ended_at < before)).rowcount

    # -- within -------------------------------------------------------------------------------

    def _leases(self, *conditions: Any, newest: int | None = None) -> list[Lease]:
        query = select(leases).where(*conditions).order_by(leases.c.seq.desc()).limit(newest)
        rows = self._connection.execute(query).all()[::-1]
        placed = [row.seq for row in rows if row.granted_at is not None]
        pieces: dict[int, list[Slice]] = defaultdict(list)
        for start in range(0, len(placed), 500):  # databases limit the parameters of one statement
            found = select(slices).where(slices.c.lease.in_(placed[start : start + 500]))
            for row in self._connection.execute(found.order_by(slices.c.lease, slices.c.gpu_index)):
                pieces[row.lease].append(slice_from(row))
        return [lease_from(row, pieces[row.seq]) for row in rows]

    def _move(self, lease_id: str, states: Collection[LeaseState], **values: Any) -> int:
        """Change a lease that is in one of ``states``; its sequence number."""
        allowed = [state.value for state in states]
        query = select(leases.c.seq).where(leases.c.id == lease_id, leases.c.state.in_(allowed))
        seq = self._connection.execute(query).scalar()
        if seq is None:
            raise LedgerUnavailable(f"the ledger has no lease {lease_id} in state {' or '.join(allowed)}")
        self._connection.execute(update(leases).where(leases.c.seq == seq).values(values))
        return int(seq)

    def _use(self, gpu_uuid: str, memory_mib: int) -> None:
        changed = self._connection.execute(
            update(gpus).where(gpus.c.uuid == gpu_uuid).values(used_mib=gpus.c.used_mib + memory_mib)
        ).rowcount
        if changed != 1:
            raise LedgerUnavailable(f"the ledger does not know the GPU {gpu_uuid}")

"""A writing transaction on the live leases in memory; at its end it writes them to the database in few statements."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import Connection, CursorResult, Executable

from jupyter_gpupool.core.errors import LedgerUnavailable
from jupyter_gpupool.core.models import Lease, LeaseState, Parked, Slice, WorkerAddress
from jupyter_gpupool.pool.scheduling.quotas import Holding, of_slices
from jupyter_gpupool.pool.scheduling.reservation import Share

from . import queries as sql
from .bulk_statements import of_rows
from .live_leases import LiveLeases
from .queries import LIVE
from .tables import gpus, lease_row, leases, slice_row, slices
from .transaction import Transaction, by_waiting

#: The attributes that hold what is not in the database yet.
_PENDING_WRITES = ("_new", "_old", "_ended", "_placed", "_replaced", "_resized", "_used", "_appended")
#: The states of leases that may be moved.
MOVABLE = (LeaseState.ACTIVE, LeaseState.PARKED)
#: The tables that :class:`LiveLeases` is read from.
_LIVE_TABLES = (leases, slices, gpus)

#: How many changes there were, and the pending writes.
Mark = tuple[int, tuple[Any, ...]]


def read_live_leases(tx: Transaction) -> LiveLeases:
    """The live leases as the database has them."""
    live = tx.leases(LIVE)
    numbers = {row.id: row.seq for row in tx.execute(sql.LIVE_SEQS)}
    return LiveLeases(live, numbers, tx.granted_mib(), tx.execute(sql.NEWEST_SEQ).scalar() or 0)


class BufferedTransaction(Transaction):
    """One or several changes, in one transaction of the database. ``stale``: the live leases must be read again."""

    def __init__(self, connection: Connection, live: LiveLeases) -> None:
        super().__init__(connection)
        self.live = live
        live.begin()
        self.stale = False
        self._flushed = 0  # how many of the changes to ``live`` are in the database
        self._forget()

    def _forget(self) -> None:
        self._new: dict[str, Lease] = {}  # not in the database yet
        self._old: dict[str, LeaseState] = {}  # in the database, with the state that it has there
        self._ended: dict[str, tuple[int, Lease]] = {}
        self._placed: dict[str, None] = {}  # leases whose slices are not in the database yet
        self._replaced: dict[str, None] = {}  # leases whose slices in the database are to be replaced
        self._resized: list[dict[str, Any]] = []
        self._used: dict[str, int] = defaultdict(int)
        self._appended: list[tuple[Executable, dict[str, Any]]] = []
        self._absent: set[str] = set()  # ids that are known not to be in the database

    # -- several changes in one transaction

    def mark(self) -> Mark:
        """The state that :meth:`undo` returns to."""
        return self.live.mark, tuple(getattr(self, name).copy() for name in _PENDING_WRITES)

    def undo(self, mark: Mark) -> bool:
        """Undo all changes since ``mark``. Returns False if some of them are in the database already."""
        if mark[0] < self._flushed:
            return False
        self.live.undo(mark[0])
        for name, part in zip(_PENDING_WRITES, mark[1], strict=True):
            setattr(self, name, part)
        return True

    # -- reading

    def lease(self, lease_id: str) -> Lease | None:
        found = self.live.leases.get(lease_id)
        if found is not None:
            return found
        if lease_id in self._ended:
            return self._ended[lease_id][1]
        return None if lease_id in self._absent else super().lease(lease_id)

    def look_for(self, lease_ids: Sequence[str]) -> None:
        """Look up many ids at once, which takes little longer than one: nearly every request has a new id."""
        wanted = [lease_id for lease_id in lease_ids if lease_id not in self.live.leases]
        if wanted:
            self._absent = set(wanted).difference(self._read(sql.FIND_IDS, {"ids": wanted}).scalars())

    def leases(
        self,
        states: tuple[LeaseState, ...] = LIVE,
        owner: str | None = None,
        newest: int | None = None,
        managed: Sequence[str] = (),
    ) -> list[Lease]:
        if not set(states) <= set(LIVE):
            self.flush()
            return super().leases(states, owner, newest, managed)
        live = self.live
        if states == (LeaseState.QUEUED,):
            found = [live.leases[lease_id] for lease_id in live.queued]
        else:
            found = [lease for lease in live.leases.values() if lease.state in states]
        if owner is not None:
            found = [
                lease for lease in found if lease.request.owner == owner or lease.request.namespace in managed
            ]
        return found if newest is None else found[len(found) - min(newest, len(found)) :]

    def woken(self) -> list[Lease]:
        return by_waiting(self.live.leases[lease_id] for lease_id in self.live.woken)

    def granted_mib(self) -> dict[str, int]:
        return self.live.granted

    def leases_on(self, uuid: str) -> Mapping[str, Share]:
        """What each lease holds of a GPU, by lease id."""
        return self.live.on(uuid)

    def held(self) -> dict[tuple[str, str], Holding]:
        held: dict[tuple[str, str], Holding] = defaultdict(Holding)
        for lease in self.live.leases.values():
            if lease.state.has_worker:
                held[lease.request.namespace, lease.request.owner] += of_slices(lease.slices)
        return dict(held)

    # -- changing

    def add(self, lease: Lease) -> None:
        """Record a request that is QUEUED."""
        lease = replace(lease, heartbeat_at=lease.created_at)
        self.live.put(lease)
        self._new[lease.id] = lease

    def grant(self, lease_id: str, pieces: Sequence[Slice], at: float, until: float | None = None) -> Lease:
        """QUEUED to GRANTED, with its slices. The database refuses what would exceed a GPU."""
        lease = self.live.leases.get(lease_id)
        if lease is None or lease.state is not LeaseState.QUEUED:
            raise LedgerUnavailable(f"the ledger has no lease {lease_id} that is queued")
        granted = replace(
            lease, state=LeaseState.GRANTED, slices=tuple(pieces), granted_at=at, expires_at=until
        )
        self._change(granted)
        self._placed[lease_id] = None
        for piece in pieces:
            self._use_gpu(piece.gpu_uuid, piece.memory_mib)
        return granted

    def activate(self, lease_id: str, worker: WorkerAddress) -> Lease:
        """GRANTED (or ACTIVE, with a worker found again) to ACTIVE."""
        lease = self.live.leases.get(lease_id)
        if lease is None or not lease.state.holds:
            raise LedgerUnavailable(f"the ledger has no lease {lease_id} that holds anything")
        active = replace(lease, state=LeaseState.ACTIVE, worker=worker)
        self._change(active)
        return active

    def park(self, lease: Lease, parked: Parked) -> Lease:
        """ACTIVE to PARKED: its slices are free from here on."""
        known = self.live.leases.get(lease.id)
        if known is None or known.state is not LeaseState.ACTIVE or known.slices != lease.slices:
            raise LedgerUnavailable(f"the ledger has no active lease {lease.id} with slices as they were")
        done = replace(known, state=LeaseState.PARKED, parked=parked)
        self._change(done)
        for piece in known.slices:
            self._use_gpu(piece.gpu_uuid, -piece.memory_mib)
        return done

    def wake(self, lease: Lease, at: float) -> Lease:
        """Record that the program of a parked lease waits for its GPUs."""
        known = self.live.leases.get(lease.id)
        if known is None or known.parked is None:
            raise LedgerUnavailable(f"the ledger has no lease {lease.id} that is parked")
        woken = replace(known, parked=replace(known.parked, wanted_since=at))
        self._change(woken)
        return woken

    def resume(self, lease: Lease, pieces: Sequence[Slice]) -> Lease:
        """PARKED to ACTIVE, with these slices. The database refuses what would exceed a GPU."""
        known = self.live.leases.get(lease.id)
        if known is None or known.state is not LeaseState.PARKED:
            raise LedgerUnavailable(f"the ledger has no lease {lease.id} that is parked")
        resumed = replace(known, state=LeaseState.ACTIVE, slices=tuple(pieces), parked=None)
        self._change(resumed)
        if lease.id not in self._placed:
            self._replaced[lease.id] = None
        for piece in pieces:
            self._use_gpu(piece.gpu_uuid, piece.memory_mib)
        return resumed

    def begin_move(self, lease: Lease, pieces: Sequence[Slice]) -> Lease:
        """Let a lease hold slices of another server, too. ``pieces``: all that it is to have.

        The database refuses what would exceed a GPU.
        """
        known = self.live.leases.get(lease.id)
        if known is None or known.state not in MOVABLE or known.moving_to or known.slices != lease.slices:
            raise LedgerUnavailable(f"the ledger has no lease {lease.id} with slices as they were")
        moving = replace(known, moving_to=tuple(pieces))
        self._change(moving)
        self._use(known, moving)
        return moving

    def end_move(self, lease: Lease, worker: WorkerAddress | None) -> Lease:
        """A lease that is moved is ACTIVE with that worker and where it moves, or, with None, where it was."""
        known = self.live.leases.get(lease.id)
        if known is None or not known.moving_to:
            raise LedgerUnavailable(f"the ledger has no lease {lease.id} that is moved")
        if worker is None:
            stayed = replace(known, moving_to=())
            self._change(stayed)
            self._use(known, stayed)
            return stayed
        moved = replace(
            known,
            state=LeaseState.ACTIVE,
            slices=known.moving_to,
            moving_to=(),
            worker=worker,
            parked=None,
        )
        self._change(moved)
        if lease.id not in self._placed:
            self._replaced[lease.id] = None
        self._use(known, moved)
        return moved

    def resize(self, lease: Lease, pieces: Sequence[Slice]) -> None:
        """Give a lease that holds slices other amounts of the same GPUs' memory."""
        known = self.live.leases.get(lease.id)
        if known is None or not known.state.holds or known.slices != lease.slices:
            raise LedgerUnavailable(f"the ledger has no slices of lease {lease.id} as they were")
        for before, piece in zip(lease.slices, pieces, strict=True):
            if piece != before:
                self._use_gpu(piece.gpu_uuid, piece.memory_mib - before.memory_mib)
                if lease.id not in self._placed and lease.id not in self._replaced:
                    self._resized.append(
                        {
                            "lease_id": lease.id,
                            "gpu": piece.gpu_uuid,
                            "before": before.memory_mib,
                            "memory": piece.memory_mib,
                        }
                    )
        self._change(replace(known, slices=tuple(pieces)))

    def set_terms(self, lease: Lease) -> None:
        """Record when a live lease expires, and who asked for it back."""
        known = self.live.leases.get(lease.id)
        if known is None:
            raise LedgerUnavailable(f"the ledger has no lease {lease.id} that lives")
        self._change(replace(known, expires_at=lease.expires_at, asked_back=lease.asked_back))

    def append(self, statement: Executable, rows: list[dict[str, Any]]) -> None:
        self._appended.extend((statement, row) for row in rows)

    def end(self, lease: Lease, state: LeaseState, reason: str, at: float) -> None:
        """From any live state to one that has ended; its slices are free from here on."""
        known = self.live.leases.get(lease.id)
        if known is None or known.state is not lease.state:
            raise LedgerUnavailable(f"the ledger has no lease {lease.id} in state {lease.state.value}")
        seq = self.live.seqs[lease.id]
        ended = replace(known, state=state, reason=reason, ended_at=at, parked=None, moving_to=())
        if lease.id not in self._new:
            self._old.setdefault(lease.id, known.state)
        self._ended[lease.id] = (seq, ended)
        self.live.drop(lease.id)
        for piece in known.held:
            self._use_gpu(piece.gpu_uuid, -piece.memory_mib)

    # -- writing to the database

    def flush(self) -> None:
        """Write all changes to the database, in their final form."""
        ended, old, placed = self._ended, self._old, self._placed
        everything = {
            lease_id: (self.live.seqs[lease_id], self.live.leases[lease_id])
            for lease_id in (*self._new, *old, *placed)
            if lease_id not in ended
        }
        everything.update(ended)
        self._many(
            sql.INSERT_LEASES,
            [
                {**lease_row(everything[lease_id][1]), **_outcome(*everything[lease_id])}
                for lease_id in self._new
            ],
        )
        self._many(sql.SET_SLICE, self._resized, "slices as they were")
        self._many(
            sql.CHANGE_LEASES,
            [
                {"of_seq": seq, "from_state": state.value, **_changed(lease)}
                for lease_id, state in old.items()
                for seq, lease in [everything[lease_id]]
            ],
            "leases as they were",
        )
        self._many(sql.CLEAR_SLICES, [{"of_seq": everything[lease_id][0]} for lease_id in self._replaced])
        self._many(
            sql.ADD_SLICE,
            [
                slice_row(everything[lease_id][0], piece)
                for lease_id in (*placed, *self._replaced)
                for piece in everything[lease_id][1].slices
            ],
        )
        # Frees first: a GPU must not hold more than its memory within a transaction either.
        uses = sorted((more, uuid) for uuid, more in self._used.items() if more)
        self._many(sql.USE_GPU, [{"gpu": uuid, "more_mib": more} for more, uuid in uses], "GPUs")
        appended: dict[Executable, list[dict[str, Any]]] = {}
        for statement, row in self._appended:
            appended.setdefault(statement, []).append(row)
        for statement, rows in appended.items():
            self._many(statement, rows)
        if everything or appended:
            self._forget()
            self._flushed = self.live.mark

    def _execute(self, statement: Executable, values: Any = None) -> CursorResult[Any]:
        """Run a statement unknown to this class, after writing the earlier changes, so that it sees them."""
        self.flush()
        if getattr(statement, "is_dml", False) and getattr(statement, "table", None) in _LIVE_TABLES:
            self.stale = True
        return self._connection.execute(statement, values)

    def _many(self, statement: Executable, rows: list[dict[str, Any]], what: str = "") -> None:
        if not rows:
            return
        at_once = of_rows(statement, rows) if self._connection.dialect.name == "postgresql" else None
        changed = self._connection.execute(*(at_once or (statement, rows))).rowcount
        if what and changed != len(rows):
            raise LedgerUnavailable(f"the ledger does not have the {what}")

    def _change(self, lease: Lease) -> None:
        if lease.id in self._new:
            self._new[lease.id] = lease
        else:
            self._old.setdefault(lease.id, self.live.leases[lease.id].state)
        self.live.put(lease)

    def _use(self, before: Lease, now: Lease) -> None:
        """A lease holds other slices than before."""
        for piece in now.held:
            if piece not in before.held:
                self._use_gpu(piece.gpu_uuid, piece.memory_mib)
        for piece in before.held:
            if piece not in now.held:
                self._use_gpu(piece.gpu_uuid, -piece.memory_mib)

    def _use_gpu(self, uuid: str, more_mib: int) -> None:
        self.live.use(uuid, more_mib)
        self._used[uuid] += more_mib


def _outcome(seq: int, lease: Lease) -> Mapping[str, Any]:
    return {"seq": seq, **_changed(lease, plain=True)}


def _changed(lease: Lease, plain: bool = False) -> dict[str, Any]:
    """The columns of a lease that may change; ``plain`` False prefixes their names with ``to_``."""
    worker = lease.worker
    values = {
        "state": lease.state.value,
        "reason": lease.reason,
        "granted_at": lease.granted_at,
        "ended_at": lease.ended_at,
        "worker_host": worker.host if worker else None,
        "worker_port": worker.port if worker else None,
        "worker_pid": worker.pid if worker else None,
        "worker_created": worker.created if worker else None,
        "worker_environment": worker.environment if worker else None,
        "worker_torch": worker.torch if worker else None,
        "workers_elsewhere": _elsewhere(worker) if worker and worker.elsewhere else None,
        "expires_at": lease.expires_at,
        "asked_back": json.dumps([asdict(one) for one in lease.asked_back]) if lease.asked_back else None,
        "parked": _parked(lease.parked) if lease.parked else None,
        "moving_to": json.dumps([asdict(one) for one in lease.moving_to]) if lease.moving_to else None,
    }
    return values if plain else {f"to_{name}": value for name, value in values.items()}


def _parked(parked: Parked) -> str:
    fields = asdict(parked)
    if not parked.by_server:  # an earlier version may read it
        del fields["by_server"]
    return json.dumps(fields)


def _elsewhere(worker: WorkerAddress) -> str:
    return json.dumps({server: one.to_json() for server, one in worker.elsewhere.items()})

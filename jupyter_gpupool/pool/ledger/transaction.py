"""One transaction of the ledger: reads and changes as SQL statements."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, CursorResult, Executable

from jupyter_gpupool.core.models import Lease, LeaseState, Server, Slice
from jupyter_gpupool.pool.scheduling.quotas import Holding

from . import migrations
from . import queries as sql
from .queries import LIVE
from .tables import lease_from, slice_from


class Transaction:
    """Reads and changes within one transaction of the ledger."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _execute(self, statement: Executable, values: Any = None) -> CursorResult[Any]:
        return self._connection.execute(statement, values)

    def _read(self, statement: Executable, values: Any = None) -> CursorResult[Any]:
        """Run a query whose rows :mod:`.buffered_transaction` takes from memory where it has changed them."""
        return self._connection.execute(statement, values)

    def append(self, statement: Executable, rows: list[dict[str, Any]]) -> None:
        """Add rows to a table without leases. Nothing reads them within this transaction."""
        self._execute(statement, rows)

    def execute(self, statement: Executable, values: Any = None) -> CursorResult[Any]:
        """Run a statement on tables without leases."""
        return self._execute(statement, values)

    # -- reading ------------------------------------------------------------------------------

    def is_current(self) -> bool:
        """Whether the tables are of this version. Raises LedgerUnavailable for those of a newer version."""
        return migrations.is_current(self._connection)

    def lease(self, lease_id: str) -> Lease | None:
        """One lease, live or ended; None if there is none."""
        row = self._read(sql.FIND_LEASE, {"lease_id": lease_id}).one_or_none()
        return self._with_slices([row])[0] if row else None

    def leases(
        self,
        states: tuple[LeaseState, ...] = LIVE,
        owner: str | None = None,
        newest: int | None = None,
        managed: Sequence[str] = (),
    ) -> list[Lease]:
        """Leases in order of arrival, at most the ``newest``; those of ``owner`` and of the ``managed`` namespaces."""
        query = sql.find_leases(states, owner is not None, bool(managed), newest is not None)
        given = {"wanted_owner": owner, "newest": newest, "managed": list(managed) or None}
        rows = self._read(query, {name: value for name, value in given.items() if value is not None})
        return self._with_slices(rows.all()[::-1])

    def woken(self) -> list[Lease]:
        """The parked leases whose programs wait for their GPUs, first come first."""
        return by_waiting(lease for lease in self.leases((LeaseState.PARKED,)) if lease.is_woken)

    def granted_mib(self) -> dict[str, int]:
        """MiB granted now by GPU uuid, for every GPU that was ever recorded."""
        return {row.uuid: row.used_mib for row in self._execute(sql.GRANTED_MIB)}

    def held(self) -> dict[tuple[str, str], Holding]:
        """What is held now, by namespace and owner; parked leases count as if they held their slices."""
        return {
            (row.namespace, row.owner): Holding(int(row.memory_mib), float(row.gpus), row.leases)
            for row in self._execute(sql.HELD)
        }

    def names_asked_for(self) -> dict[str, int]:
        """How many requests in the ledger's history had each text in their filter ``name``."""
        asked: dict[str, int] = defaultdict(int)
        for row in self._execute(sql.FILTERS_ASKED_FOR):
            name = json.loads(row.filters).get("name")
            if name is not None:
                asked[name] += row.times
        return dict(asked)

    # -- changing -----------------------------------------------------------------------------

    def touch(self) -> None:
        """Write a row without changing it."""
        self._execute(sql.TOUCH_VERSION)

    def record_gpus(self, servers: Sequence[Server]) -> None:
        """Record every GPU. What is granted on a known GPU stays granted."""
        known = {row.uuid: row for row in self._execute(sql.GPUS)}
        for gpu in (gpu for server in servers for gpu in server.gpus):
            row = known.get(gpu.uuid)
            if row is None:
                values = {"uuid": gpu.uuid, "server": gpu.server, "memory_mib": gpu.memory_mib, "used_mib": 0}
                self._execute(sql.ADD_GPU, values)
                continue
            # A GPU that returns with less memory keeps its grants; placement uses its new size.
            memory = max(gpu.memory_mib, row.used_mib)
            if (row.server, row.memory_mib) != (gpu.server, memory):
                self._execute(sql.SET_GPU, {"gpu": gpu.uuid, "at_server": gpu.server, "memory": memory})

    def prune(self, before: float) -> int:
        """Delete the leases that ended before that time (seconds since the epoch). Returns how many."""
        self._execute(sql.PRUNE_SLICES, {"before": before})
        return self._execute(sql.PRUNE_LEASES, {"before": before}).rowcount

    # -- within -------------------------------------------------------------------------------

    def _with_slices(self, rows: Sequence[Any]) -> list[Lease]:
        placed = [row.seq for row in rows if row.granted_at is not None]
        pieces: dict[int, list[Slice]] = defaultdict(list)
        for start in range(0, len(placed), 500):  # databases limit the parameters of one statement
            some = placed[start : start + 500]
            one = len(some) == 1
            found = self._read(
                sql.SLICES_OF if one else sql.SLICES_OF_MANY, {"seq": some[0]} if one else {"seqs": some}
            )
            for row in found:
                pieces[row.lease].append(slice_from(row))
        return [lease_from(row, pieces[row.seq]) for row in rows]


def by_waiting(leases: Iterable[Lease]) -> list[Lease]:
    """Woken leases in the order in which they were woken."""
    return sorted(leases, key=lambda lease: lease.parked.wanted_since or 0.0 if lease.parked else 0.0)

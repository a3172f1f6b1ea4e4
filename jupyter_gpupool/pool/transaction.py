"""What can be read and changed within one transaction of the ledger, in the database's own words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, CursorResult, Executable

from . import migrations
from . import statements as sql
from .limits import Holding
from .models import Lease, LeaseState, Server, Slice
from .schema import lease_from, slice_from
from .statements import LIVE


class Transaction:
    """What can be read and changed within one transaction of the ledger."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _execute(self, statement: Executable, values: Any = None) -> CursorResult[Any]:
        return self._connection.execute(statement, values)

    def _read(self, statement: Executable, values: Any = None) -> CursorResult[Any]:
        """For what :mod:`.viewing` knows the answer to where it has changed."""
        return self._connection.execute(statement, values)

    def append(self, statement: Executable, rows: list[dict[str, Any]]) -> None:
        """Add rows to a table that is not about leases; nobody reads them within this transaction."""
        self._execute(statement, rows)

    def execute(self, statement: Executable, values: Any = None) -> CursorResult[Any]:
        """For tables that are not about leases."""
        return self._execute(statement, values)

    # -- reading ------------------------------------------------------------------------------

    def is_current(self) -> bool:
        """Whether the tables are this version's. Raises LedgerUnavailable for those of a newer one."""
        return migrations.is_current(self._connection)

    def lease(self, lease_id: str) -> Lease | None:
        row = self._read(sql.FIND_LEASE, {"lease_id": lease_id}).one_or_none()
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
        rows = self._read(query, {name: value for name, value in given.items() if value is not None})
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
            found = self._read(
                sql.SLICES_OF if one else sql.SLICES_OF_MANY, {"seq": some[0]} if one else {"seqs": some}
            )
            for row in found:
                pieces[row.lease].append(slice_from(row))
        return [lease_from(row, pieces[row.seq]) for row in rows]

"""How much of the pool was in use, over time: fine for an hour, coarser for a day and a week.

Every sample belongs to a slot of its step; its ``at`` is the slot's start. When a coarser slot is over, its sample is
the mean of the finer samples in it. Slots in which no pool ran have no sample: a gap, never zero.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, delete, func, insert, select

from jupyter_gpupool.core.errors import InvalidRequest

from .ledger.ledger import Ledger, Transaction
from .ledger.tables import samples

#: (seconds of a slot, seconds that its samples are kept), finest first. Each step divides the next.
TIERS = ((5, 3600), (60, 86400), (600, 7 * 86400))
#: The most points in a series; a chart is not wider.
MOST_POINTS = 2000


@dataclass(frozen=True)
class Use:
    """One GPU in one slot: its memory, the MiB granted and used, and the fraction of the time that it computed.

    ``by_lease``: the same fraction for each lease that computed, by :func:`short_id`; None if that is not known.
    """

    memory_mib: int
    granted_mib: float
    used_mib: float
    busy: float
    by_lease: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Sample:
    """The pool in one slot, GPU by GPU."""

    at: int
    gpus: Mapping[str, Use]


_OF_STEP = samples.c.step_s == bindparam("of_step")
_ADD = insert(samples)
_DROP = delete(samples).where(_OF_STEP, samples.c.at < bindparam("before"))
_REPLACE = delete(samples).where(_OF_STEP, samples.c.at == bindparam("slot"))
_NEWEST = select(func.max(samples.c.at)).where(_OF_STEP)
_BETWEEN = (
    select(samples)
    .where(_OF_STEP, samples.c.at >= bindparam("first"), samples.c.at < bindparam("end"))
    .order_by(samples.c.at)
)
_TOTALS_BETWEEN = (
    select(*(samples.c[name] for name in ("step_s", "at", "memory_mib", "granted_mib", "used_mib", "busy")))
    .where(_OF_STEP, samples.c.at >= bindparam("first"), samples.c.at < bindparam("end"))
    .order_by(samples.c.at)
)


class History:
    """The samples of one ledger. Called on the manager's thread. Raises LedgerUnavailable."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        with ledger.reading() as tx:
            self._newest: int | None = tx.execute(_NEWEST, {"of_step": TIERS[0][0]}).scalar()

    def due(self, now: float) -> bool:
        """Whether ``now`` is in a slot that has no sample yet, also after the clock was set back."""
        slot = _slot(now, TIERS[0][0])
        return self._newest is None or slot > self._newest or slot < self._newest - TIERS[0][0]

    def record(self, now: float, gpus: Mapping[str, Use]) -> None:
        """Record a sample for the slot of ``now``, close the coarser slots that are over, and delete old samples."""
        step, _ = TIERS[0]
        slot = _slot(now, step)
        with self._ledger.transaction() as tx:
            _write(tx, step, Sample(slot, gpus))
            if self._newest is not None and slot != self._newest:
                _close(tx, self._newest, slot)
            for tier, kept_s in TIERS:
                tx.execute(_DROP, {"of_step": tier, "before": int(now - kept_s)})
                # After the clock was set back there are samples of the future, which would stay for ever.
                tx.execute(
                    delete(samples).where(_OF_STEP, samples.c.at > bindparam("after")),
                    {"of_step": tier, "after": int(now)},
                )
        self._newest = slot

    def series(
        self, now: float, since: float, step: int | None = None, gpus: Sequence[str] | None = ()
    ) -> dict[str, Any]:
        """Columns over a regular grid from ``since`` to ``now``, in seconds since the epoch; None for a gap.

        ``gpus``: the GPUs with columns of their own, by uuid; None for all. ``step``: in seconds; None fits the span.
        Raises InvalidRequest for a step below 1.
        """
        since = min(max(since, now - TIERS[-1][1]), now)
        base, step = fitting(now - since, step)
        first = _slot(since, step)
        times = list(range(first, math.floor(now) + 1, step))
        statement = _TOTALS_BETWEEN if gpus is not None and not gpus else _BETWEEN
        rows: list[Any] = []
        reached = first
        with self._ledger.reading() as tx:
            # The tier that reaches far enough back, then the finer ones for the slots that it has not closed yet.
            for tier, _ in reversed(TIERS[: base + 1]):
                found = tx.execute(
                    statement, {"of_step": tier, "first": reached, "end": math.floor(now) + 1}
                ).all()
                rows += found
                reached = found[-1].at + tier if found else reached
        return {
            "since": first,
            "until": now,
            "step": step,
            "times": times,
            **_columns(rows, times, step, gpus),
        }


def fitting(span_s: float, wanted: int | None = None) -> tuple[int, int]:
    """The index of the tier that reaches ``span_s`` back, and the step of the series: a multiple of the tier's."""
    if wanted is not None and wanted < 1:
        raise InvalidRequest(f"step={wanted}: give 1 second or more")
    base = next((n for n, (_, kept_s) in enumerate(TIERS) if span_s <= kept_s), len(TIERS) - 1)
    finest = TIERS[base][0]
    return base, math.ceil(max(wanted or finest, span_s / MOST_POINTS) / finest) * finest


def short_id(lease_id: str) -> str:
    """A lease's name in the samples of one GPU. Whole ids would make up most of what a large pool keeps."""
    return lease_id[:8]


def _slot(at: float, step: int) -> int:
    return math.floor(at / step) * step


def _write(tx: Transaction, step: int, sample: Sample) -> None:
    tx.execute(_REPLACE, {"of_step": step, "slot": sample.at})
    uses = list(sample.gpus.values())
    packed = {uuid: _packed(use) for uuid, use in sample.gpus.items()}
    tx.execute(
        _ADD,
        {
            "step_s": step,
            "at": sample.at,
            "memory_mib": sum(u.memory_mib for u in uses),
            "granted_mib": round(sum(u.granted_mib for u in uses)),
            "used_mib": round(sum(u.used_mib for u in uses)),
            "busy": _mean((1, u.busy) for u in uses),
            "gpus": zlib.compress(json.dumps(packed, separators=(",", ":")).encode(), 1),
        },
    )


def _packed(use: Use) -> list[Any]:
    values = [use.memory_mib, round(use.granted_mib), round(use.used_mib), round(use.busy, 3)]
    if use.by_lease is None:
        return values
    return [*values, {lease: share for lease, busy in use.by_lease.items() if (share := round(busy, 3))}]


def _close(tx: Transaction, before: int, now: int) -> None:
    """Write the coarser samples of the slots that ended between two fine ones."""
    for (finer, _), (step, _) in zip(TIERS, TIERS[1:]):
        slot = _slot(before, step)
        if slot == _slot(now, step):
            return
        rows = tx.execute(_BETWEEN, {"of_step": finer, "first": slot, "end": slot + step}).all()
        if rows:
            _write(tx, step, Sample(slot, _averaged([(row.step_s, unpacked(row.gpus)) for row in rows])))


def _averaged(parts: Sequence[tuple[float, Mapping[str, Use]]]) -> dict[str, Use]:
    """Each GPU's means over the samples that have it; each part comes with its weight."""
    by_gpu: dict[str, list[tuple[float, Use]]] = {}
    for weight, part in parts:
        for uuid, use in part.items():
            by_gpu.setdefault(uuid, []).append((weight, use))
    return {
        uuid: Use(
            uses[-1][1].memory_mib,
            _mean((weight, u.granted_mib) for weight, u in uses),
            _mean((weight, u.used_mib) for weight, u in uses),
            _mean((weight, u.busy) for weight, u in uses),
            _mean_by_lease(uses),
        )
        for uuid, uses in by_gpu.items()
    }


def _mean_by_lease(uses: Sequence[tuple[float, Use]]) -> dict[str, float] | None:
    """The mean of each lease; one that a sample does not have did not compute in it. None if any is not known."""
    known = [(weight, use.by_lease) for weight, use in uses if use.by_lease is not None]
    if len(known) < len(uses):
        return None
    leases = {lease for _, shares in known for lease in shares}
    return {lease: _mean((weight, shares.get(lease, 0.0)) for weight, shares in known) for lease in leases}


def unpacked(gpus: bytes) -> dict[str, Use]:
    """The GPUs of a sample, by uuid, as the ledger has them."""
    return {uuid: Use(*values) for uuid, values in json.loads(zlib.decompress(gpus)).items()}


_FIELDS: tuple[tuple[str, Callable[[float], float]], ...] = (
    ("memory_mib", round),
    ("granted_mib", round),
    ("used_mib", round),
    ("busy", lambda value: round(value, 3)),
)


def _columns(
    rows: Sequence[Any], times: Sequence[int], step: int, gpus: Sequence[str] | None
) -> dict[str, Any]:
    """Rows of any tier, averaged into the slots of the series."""
    by_slot: dict[int, list[Any]] = {}
    for row in rows:
        by_slot.setdefault(_slot(row.at, step), []).append(row)
    whole = {name: [_filled(by_slot.get(t), name, tidy) for t in times] for name, tidy in _FIELDS}
    if gpus is not None and not gpus:
        return {**whole, "gpus": {}}
    averaged = {
        slot: _averaged([(row.step_s, unpacked(row.gpus)) for row in some]) for slot, some in by_slot.items()
    }
    names = sorted({uuid for part in averaged.values() for uuid in part}) if gpus is None else list(gpus)
    each = {}
    for uuid in names:
        uses = [averaged.get(t, {}).get(uuid) for t in times]
        if any(uses):
            each[uuid] = {
                n: [None if u is None else tidy(getattr(u, n)) for u in uses] for n, tidy in _FIELDS
            }
    return {**whole, "gpus": each}


def _filled(rows: Sequence[Any] | None, name: str, tidy: Callable[[float], float]) -> float | None:
    return tidy(_mean((row.step_s, getattr(row, name)) for row in rows)) if rows else None


def _mean(weighted: Iterable[tuple[float, float]]) -> float:
    """The mean of (weight, value) pairs: a sample of a minute counts twelve times one of five seconds."""
    found = list(weighted)
    total = sum(weight for weight, _ in found)
    return sum(weight * value for weight, value in found) / total if total else 0.0

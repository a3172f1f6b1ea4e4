"""How many GPU-hours were granted, by user, namespace or GPU, and in how many of them something computed.

A GPU-hour is a whole GPU for an hour, or half of its memory for two. What was granted is in the ledger for as long as
ended leases are, and the database adds it up. For how long a lease computed is in the samples of
:mod:`.usage_history`. Samples of former versions have it of a GPU, not of a lease. So while rows of the report shared a
GPU that computed then, which of them computed is not known, as when nothing was measured; slices of one row on one GPU
computed together.

While a lease is parked, others have its GPUs; the audit log has when that was.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import Double, and_, bindparam, case, cast, distinct, func, or_, select

from jupyter_gpupool.core.errors import InvalidRequest

from .ledger.ledger import Ledger
from .ledger.tables import audit, leases, samples, slices
from .usage_history import TIERS, short_id, unpacked

_WORDS = ("granted", "computing", "idle", "unknown", "parked")
#: How long the ledger keeps leases that have ended, in seconds.
LEASES_KEPT_S = 30 * 86400.0

_KEYS = {"user": leases.c.owner, "namespace": leases.c.namespace, "gpu": slices.c.gpu_uuid}
#: What a report may have a row for.
BY = tuple(_KEYS)

_SINCE = bindparam("since", type_=Double)
_UNTIL = bindparam("until", type_=Double)
_START = case((leases.c.granted_at < _SINCE, _SINCE), else_=leases.c.granted_at)
_END = case((or_(leases.c.ended_at.is_(None), leases.c.ended_at > _UNTIL), _UNTIL), else_=leases.c.ended_at)
_SHARE = cast(slices.c.memory_mib, Double) / slices.c.total_mib
_AT = case((audit.c.at < _SINCE, _SINCE), else_=audit.c.at)
_PARKS_WITHIN = and_(
    audit.c.action.in_(("park", "resume")), audit.c.at >= bindparam("kept", type_=Double), audit.c.at < _UNTIL
)
#: Of each lease that was parked: the times of resuming less those of parking, and whether it is parked still.
_PARKS = (
    select(
        audit.c.subject.label("id"),
        func.sum(case((audit.c.action == "resume", _AT), else_=-_AT)).label("parked_s"),
        func.sum(case((audit.c.action == "resume", -1), else_=1)).label("parked_still"),
    )
    .where(_PARKS_WITHIN)
    .group_by(audit.c.subject)
    .subquery()
)
# A lease that was parked before the first entry that is kept begins with being resumed.
_PARKED_S = func.coalesce(
    _PARKS.c.parked_s + case((_PARKS.c.parked_still < 0, -_START), else_=_PARKS.c.parked_still * _END),
    0.0,
)
_GRANTED_S = func.sum((_END - _START - _PARKED_S) * _SHARE)
_WITHIN = and_(slices.c.lease == leases.c.seq, leases.c.granted_at < _UNTIL, _END > _START)
_MINE = leases.c.owner == bindparam("owner")

_GRANTED = {
    by: select(
        key.label("name"),
        func.count(distinct(leases.c.seq)).label("leases"),
        _GRANTED_S.label("granted_s"),
        func.sum(_PARKED_S * _SHARE).label("parked_s"),
        func.max(slices.c.server).label("server"),
        func.max(slices.c.gpu_index).label("gpu_index"),
    )
    .select_from(leases.join(slices).outerjoin(_PARKS, _PARKS.c.id == leases.c.id))
    .where(_WITHIN)
    .group_by(key)
    .order_by(_GRANTED_S.desc(), key)
    for by, key in _KEYS.items()
}
_HELD = {
    by: select(
        slices.c.gpu_uuid,
        key.label("name"),
        leases.c.id,
        leases.c.owner,
        _START.label("start"),
        _END.label("end"),
        _SHARE.label("share"),
    ).where(_WITHIN)
    for by, key in _KEYS.items()
}
_PARKS_AND_RESUMES = (
    select(audit.c.subject, audit.c.action, audit.c.at).where(_PARKS_WITHIN).order_by(audit.c.id)
)
_MY_LEASES, _MY_SLICES = leases.alias(), slices.alias()
_GPUS_OF_MINE = select(_MY_SLICES.c.gpu_uuid).where(
    _MY_SLICES.c.lease == _MY_LEASES.c.seq, _MY_LEASES.c.owner == bindparam("owner")
)
_SAMPLES = (
    select(samples.c.step_s, samples.c.at, samples.c.gpus)
    .where(
        samples.c.step_s == bindparam("of_step"),
        samples.c.at >= bindparam("first"),
        samples.c.at < bindparam("end"),
    )
    .order_by(samples.c.at)
)


@dataclass(frozen=True)
class Held:
    """A slice while it was held, in seconds since the epoch. ``name``: the row it belongs to; None for none.

    ``lease``: its lease's :func:`~.usage_history.short_id`.
    """

    gpu: str
    name: str | None
    start: float
    end: float
    share: float
    lease: str = ""


@dataclass(frozen=True)
class Measured:
    """A slot of time, and the fraction of it in which each GPU computed, by uuid.

    ``by_lease``: the same of each lease that computed, by uuid and short id; without a GPU where that is not known.
    """

    start: float
    end: float
    busy: Mapping[str, float]
    by_lease: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Reading:
    """What the ledger has for one report, of ``owner`` or of everybody (None).

    :attr:`steps` read it, each in a transaction of its own, so that others can use the ledger in between;
    :func:`report` then needs the ledger no more. ``since`` is in seconds since the epoch; a report reaches back as far
    as the ledger does, which is the default. Raises InvalidRequest.
    """

    def __init__(
        self, now: float, since: float | None = None, by: str = "user", owner: str | None = None
    ) -> None:
        if by not in BY:
            raise InvalidRequest(f"by={by[:40]}: give one of {', '.join(BY)}")
        self.now = now
        self.since = min(max(since or 0.0, now - LEASES_KEPT_S), now)
        self.by = by
        self._owner = owner
        self._span = {"since": self.since, "until": now, "kept": now - LEASES_KEPT_S}
        self._mine = {} if owner is None else {"owner": owner}
        self.granted: Sequence[Any] = ()
        self.packed: list[Any] = []
        self.held: list[Held] = []

    @property
    def steps(self) -> Sequence[Callable[[Ledger], None]]:
        """To be called in this order. Each raises LedgerUnavailable."""
        return self._read_granted, self._read_samples, self._read_held

    def _read_granted(self, ledger: Ledger) -> None:
        statement = _GRANTED[self.by].where(_MINE) if self._mine else _GRANTED[self.by]
        with ledger.reading() as tx:
            self.granted = tx.execute(statement, {**self._span, **self._mine}).all()

    def _read_samples(self, ledger: Ledger) -> None:
        reached = math.floor(self.since) - TIERS[-1][0]
        with ledger.reading() as tx:
            # The coarsest samples, then the finer ones for the slots that are not over yet.
            for tier, _ in reversed(TIERS):
                span = {"of_step": tier, "first": reached, "end": math.ceil(self.now)}
                found = tx.execute(_SAMPLES, span).all()
                self.packed += found
                reached = found[-1].at + tier if found else reached

    def _read_held(self, ledger: Ledger) -> None:
        if not self.packed:
            return
        statement = _HELD[self.by]
        if self._mine:
            # With the slices of others on the same GPUs, for those may be what computed.
            statement = statement.where(slices.c.gpu_uuid.in_(_GPUS_OF_MINE))
        measured = {**self._span, **self._mine, "since": max(self.since, self.packed[0].at)}
        parks: dict[str, list[tuple[str, float]]] = {}
        with ledger.reading() as tx:
            rows = tx.execute(statement, measured).all()
            for entry in tx.execute(_PARKS_AND_RESUMES, self._span).all():
                parks.setdefault(entry.subject, []).append((entry.action, entry.at))
        for row in rows:
            name = row.name if self._owner in (None, row.owner) else None
            for start, end in _unparked(row.start, row.end, parks.get(row.id, ())):
                self.held.append(Held(row.gpu_uuid, name, start, end, row.share, short_id(row.id)))


def _unparked(start: float, end: float, parks: Sequence[tuple[str, float]]) -> Iterator[tuple[float, float]]:
    """The parts of a time in which a lease was not parked. ``parks``: when it was parked and resumed, in order."""
    since: float | None = None if parks and parks[0][0] == "resume" else start
    for action, at in parks:
        if action == "resume":
            since = max(start, at)
        elif since is not None:
            if since < min(at, end):
                yield since, min(at, end)
            since = None
    if since is not None and since < end:
        yield since, end


def report(reading: Reading) -> dict[str, Any]:
    """Return the report as JSON: hours by row, most granted first."""
    slots = [
        Measured(row.at, row.at + row.step_s, *_busy(row.gpus))
        for row in reading.packed
        if row.at + row.step_s > reading.since
    ]
    known = attributed(reading.held, slots)
    rows = []
    for row in reading.granted:
        computing_s, idle_s = known.get(row.name, (0.0, 0.0))
        unknown_s = max(0.0, row.granted_s - computing_s - idle_s)
        seconds = (row.granted_s, computing_s, idle_s, unknown_s, row.parked_s)
        rows.append(
            {
                "name": row.name,
                "gpu": f"{row.server}:{row.gpu_index}" if reading.by == "gpu" else "",
                "leases": row.leases,
                **{f"{word}_h": round(of / 3600, 6) for word, of in zip(_WORDS, seconds)},
            }
        )
    return {
        "since": reading.since,
        "until": reading.now,
        "by": reading.by,
        "measured_since": max(reading.since, slots[0].start) if slots else None,
        "rows": rows,
    }


def _busy(packed: bytes) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    uses = unpacked(packed)
    by_lease = {uuid: dict(use.by_lease) for uuid, use in uses.items() if use.by_lease is not None}
    return {uuid: use.busy for uuid, use in uses.items()}, by_lease


def attributed(held: Iterable[Held], slots: Sequence[Measured]) -> dict[str, tuple[float, float]]:
    """The GPU-seconds of each row that are known to have computed, and to have been idle.

    ``slots`` are in order and do not overlap.
    """
    by_gpu: dict[str, list[Held]] = {}
    for one in held:
        by_gpu.setdefault(one.gpu, []).append(one)
    ends = [slot.end for slot in slots]
    known: dict[str, tuple[float, float]] = {}
    for gpu, some in by_gpu.items():
        in_slot: dict[int, list[Held]] = {}
        for one in some:
            n = bisect_right(ends, one.start)
            while n < len(slots) and slots[n].start < one.end:
                if gpu in slots[n].busy:
                    in_slot.setdefault(n, []).append(one)
                n += 1
        for n, together in in_slot.items():
            slot = slots[n]
            for alike in _computing_alike(slot, gpu, together):
                spans = [(max(one.start, slot.start), min(one.end, slot.end)) for one in alike.held]
                length = _covered(spans)
                computing = min(1.0, alike.busy_s / length) if length > 0 else 0.0
                for one, (start, end) in zip(alike.held, spans):
                    if one.name is not None:
                        gpu_s = (end - start) * one.share
                        before = known.get(one.name, (0.0, 0.0))
                        known[one.name] = before[0] + gpu_s * computing, before[1] + gpu_s * (1 - computing)
    return known


class _Alike(NamedTuple):
    """Slices of one GPU, and for how many seconds of a slot they computed."""

    held: Sequence[Held]
    busy_s: float


def _computing_alike(slot: Measured, gpu: str, held: Sequence[Held]) -> Iterator[_Alike]:
    """A GPU's slices in a slot, those together that computed together. Without those of which that is not known."""
    by_lease, length_s = slot.by_lease.get(gpu), slot.end - slot.start
    if by_lease is not None:
        for lease in dict.fromkeys(one.lease for one in held):
            busy_s = by_lease.get(lease, 0.0) * length_s
            yield _Alike([one for one in held if one.lease == lease], busy_s)
    elif not slot.busy[gpu] or len({one.name for one in held}) == 1:
        yield _Alike(held, slot.busy[gpu] * length_s)


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans lasts."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total

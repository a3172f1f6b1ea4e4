"""The pool as those who watch it are told: its whole state once, then what has changed.

Each scope (whose leases may be seen) has a view of its own. A view numbers its deltas and remembers
the last ones, so that who lost the connection goes on where they were. While nobody watches, nothing
is read.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from ..pool.errors import PoolError
from ..pool.models import Lease

#: How often the pool is read while somebody watches, in seconds; a lease's change is told at once.
SAMPLE_S = 1.0
#: Changes that come together are told together.
_GATHER_S = 0.05
#: How many deltas a view remembers: ten minutes of a quiet pool.
_REMEMBERED = 600
_MOST_VIEWS = 200


class Pool(Protocol):
    """The calls of a pool that a feed is made of."""

    def scope(self, owner: str) -> str | None: ...
    async def pool(self, owner: str | None) -> dict[str, Any]: ...
    async def leases(self, owner: str | None, include_ended: bool = False) -> list[Lease]: ...
    async def wait(self, lease_id: str, owner: str | None, wait_s: float) -> Lease: ...
    def listen(self, callback: Callable[[dict[str, Any]], None]) -> Callable[[], None]: ...


class Watcher(Protocol):
    """Who is told."""

    def tell(self, message: dict[str, Any]) -> None:
        """Must neither wait nor raise."""

    def end(self, reason: str) -> None:
        """The pool cannot be read; try again later."""


class Feed:
    """The views of one pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._views: dict[str | None, View] = {}

    def view(self, owner: str | None) -> View:
        """What ``owner`` sees, or (None) everything."""
        scope = None if owner is None else self._pool.scope(owner)
        view = self._views.pop(scope, None) or View(self._pool, scope)
        self._views[scope] = view  # the newest last
        for old in [s for s, v in self._views.items() if not v.watched][: len(self._views) - _MOST_VIEWS]:
            del self._views[old]
        return view


class View:
    """What one scope sees of the pool."""

    def __init__(self, pool: Pool, scope: str | None) -> None:
        self._pool = pool
        self._scope = scope
        self._id = uuid.uuid4().hex
        self._seq = 0
        self._state: dict[str, Any] | None = None
        self._told: dict[str, tuple[Lease, dict[str, Any]]] = {}  # by id: each lease of the state, and its JSON
        self._deltas: deque[dict[str, Any]] = deque(maxlen=_REMEMBERED)
        self._watchers: list[Watcher] = []
        self._follower: asyncio.Task | None = None
        self._stirred = asyncio.Event()

    @property
    def watched(self) -> int:
        """How many do."""
        return len(self._watchers)

    async def join(self, watcher: Watcher, feed: str = "", seq: int = -1) -> None:
        """Tell the watcher the state, or what it missed since ``seq`` of ``feed``. Raises PoolError."""
        if self._state is None:
            self._state = await self._read()
        missed = self._since(seq) if feed == self._id else None
        if missed is None:
            watcher.tell({"type": "state", "feed": self._id, "seq": self._seq, "at": _now(), **self._state})
        else:
            watcher.tell({"type": "resumed", "feed": self._id, "seq": seq, "at": _now()})
            for delta in missed:
                watcher.tell(delta)
        self._watchers.append(watcher)
        if self._follower is None or self._follower.done():
            self._follower = asyncio.create_task(self._follow())

    def leave(self, watcher: Watcher) -> None:
        if watcher in self._watchers:
            self._watchers.remove(watcher)
        if not self._watchers and self._follower is not None:
            self._follower.cancel()
            self._follower = None

    def _since(self, seq: int) -> list[dict[str, Any]] | None:
        """The deltas after ``seq``, if all of them are remembered."""
        oldest = self._seq - len(self._deltas)
        return [d for d in self._deltas if d["seq"] > seq] if oldest <= seq <= self._seq else None

    async def _follow(self) -> None:
        stop = self._pool.listen(lambda change: self._stirred.set())
        try:
            while True:
                await self._step()
                try:
                    await asyncio.wait_for(self._stirred.wait(), SAMPLE_S)
                except (TimeoutError, asyncio.TimeoutError):
                    continue
                self._stirred.clear()
                await asyncio.sleep(_GATHER_S)
        except (PoolError, RuntimeError) as e:  # RuntimeError: its thread has ended
            watchers, self._watchers = self._watchers, []
            for watcher in watchers:
                watcher.end(str(e))
        finally:
            stop()

    async def _step(self) -> None:
        assert self._state is not None
        state = await self._read()
        changes = difference(self._state, state)
        for lease_id, lease in changes.get("leases", {}).items():
            if lease is None:
                changes["leases"][lease_id] = await self._ended(lease_id)
        self._state = state
        self._seq += 1
        delta = {"type": "delta", "seq": self._seq, "at": _now(), **changes}
        self._deltas.append(delta)
        for watcher in list(self._watchers):
            watcher.tell(delta)

    async def _ended(self, lease_id: str) -> dict[str, Any] | None:
        """How a lease ended, which those who watch may want to say."""
        try:
            return _told(await self._pool.wait(lease_id, self._scope, 0))
        except PoolError:
            return None

    async def _read(self) -> dict[str, Any]:
        pool = await self._pool.pool(self._scope)
        leases = await self._pool.leases(self._scope)
        self._told = {lease.id: (lease, self._tell(lease)) for lease in leases}
        return document(pool, {lease_id: told for lease_id, (_, told) in self._told.items()})

    def _tell(self, lease: Lease) -> dict[str, Any]:
        """The same object as before where nothing has changed, which is known at once of the same lease."""
        known, told = self._told.get(lease.id, (None, None))
        if told is not None and known is lease:
            return told
        now = _told(lease)
        return told if told == now else now


def document(pool: dict[str, Any], leases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The pool with its GPUs by their ids, as deltas name them, and the leases."""
    return {
        "servers": [{**s, "gpus": [gpu["uuid"] for gpu in s["gpus"]]} for s in pool["servers"]],
        "gpus": {gpu["uuid"]: gpu for s in pool["servers"] for gpu in s["gpus"]},
        "leases": leases,
        "queue": pool["queue"],
        "healthy": pool["healthy"],
    }


def difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What to change in ``old``: whole parts; of GPUs only the fields; None for what is gone."""
    changes: dict[str, Any] = {
        part: new[part] for part in ("servers", "queue", "healthy") if old[part] != new[part]
    }
    for part in ("gpus", "leases"):
        found: dict[str, Any] = dict.fromkeys(old[part].keys() - new[part].keys())
        for key, value in new[part].items():
            before = old[part].get(key)
            if before is value or before == value:
                continue
            if before is None or part == "leases":
                found[key] = value
            else:
                found[key] = {k: v for k, v in value.items() if k not in before or before[k] != v}
        if found:
            changes[part] = found
    return changes


def _told(lease: Lease) -> dict[str, Any]:
    """Without what changes all the time and interests nobody who watches."""
    data = lease.to_json()
    del data["heartbeat_at"]
    return data


def _now() -> float:
    return round(time.time(), 1)

"""Sends the pool to its watchers: its whole state once, then what has changed.

The pool is read once for all watchers, and not at all while there are none. Watchers of one scope (the leases that
they may see) share a state, which numbers its deltas and keeps the last ones. A watcher that lost its connection
resumes from there.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.core.models import Lease
from jupyter_gpupool.pool.tenancy.namespaces import Namespaces

from .visibility import VisiblePool, difference, lease_json, now

#: Seconds between two reads of the pool while it has watchers. A lease's change is sent at once.
SAMPLE_INTERVAL_S = 1.0
#: Changes within so many seconds are sent together.
_BATCH_S = 0.05
#: The most deltas that a scope keeps: ten minutes of a quiet pool.
_MAX_DELTAS = 600
_MAX_VIEWS = 200


class Pool(Protocol):
    """The calls that a feed makes of a pool."""

    def scope(self, owner: str) -> str | None: ...
    async def look(self) -> tuple[dict[str, Any], list[Lease], Namespaces]: ...
    async def wait(self, lease_id: str, owner: str | None, wait_s: float) -> Lease: ...
    def listen(self, callback: Callable[[dict[str, Any]], None]) -> Callable[[], None]: ...


class Watcher(Protocol):
    """One connection that watches the pool."""

    def send(self, message: str) -> None:
        """Send a message in JSON. Must neither wait nor raise."""

    def end(self, reason: str) -> None:
        """Close the connection: the pool cannot be read for now."""


class Feed:
    """The watchers of one pool, by scope."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._views: dict[str | None, WatcherState] = {}
        self._visible_pool: VisiblePool | None = None  # as read last, while there are watchers
        self._read_lock = asyncio.Lock()
        self._follower: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def view(self, owner: str | None) -> WatcherState:
        """Return the state that ``owner`` (None: an administrator) watches."""
        scope = None if owner is None else self.pool.scope(owner)
        view = self._views.pop(scope, None) or WatcherState(self, scope)
        self._views[scope] = view  # the newest last
        for old in [s for s, v in self._views.items() if not v.watched][: len(self._views) - _MAX_VIEWS]:
            del self._views[old]
        return view

    async def visible_pool(self) -> VisiblePool:
        """Return the pool as it was read last, while it has watchers, else as it is now. Raises PoolError."""
        return self._visible_pool or await self._look()

    def settle(self, scope: str | None, view: WatcherState) -> None:
        """Start or stop reading the pool, after a watcher of that state came or left."""
        self._views.setdefault(scope, view)
        watched = any(view.watched for view in self._views.values())
        if watched and (self._follower is None or self._follower.done()):
            self._follower = asyncio.create_task(self._follow())
        elif not watched and self._follower is not None:
            self._follower.cancel()
            self._follower = None
            self._visible_pool = None

    async def _look(self) -> VisiblePool:
        async with self._read_lock:
            return VisiblePool(*await self.pool.look(), self._visible_pool)

    async def _follow(self) -> None:
        stop = self.pool.listen(lambda change: self._changed.set())
        try:
            while True:
                self._visible_pool = await self._look()
                for view in list(self._views.values()):
                    if view.watched:
                        await view.step(self._visible_pool)
                try:
                    await asyncio.wait_for(self._changed.wait(), SAMPLE_INTERVAL_S)
                except (TimeoutError, asyncio.TimeoutError):
                    continue
                self._changed.clear()
                await asyncio.sleep(_BATCH_S)
        except (PoolError, RuntimeError) as e:  # RuntimeError: its thread has ended
            self._visible_pool = None
            for view in self._views.values():
                view.end(str(e))
        finally:
            stop()


class WatcherState:
    """What the watchers of one scope see of the pool."""

    def __init__(self, feed: Feed, scope: str | None) -> None:
        self._feed = feed
        self._scope = scope
        self._id = uuid.uuid4().hex
        self._seq = 0
        self._visible_pool: VisiblePool | None = None
        self._state: dict[str, Any] = {}  # as sent last
        self._deltas: deque[tuple[int, str]] = deque(maxlen=_MAX_DELTAS)
        self._watchers: list[Watcher] = []
        self._stepping = asyncio.Lock()

    @property
    def watched(self) -> int:
        """The number of watchers."""
        return len(self._watchers)

    async def join(self, watcher: Watcher, feed: str = "", seq: int = -1) -> None:
        """Send the watcher the state, or what it missed since ``seq`` of ``feed``. Raises PoolError."""
        if not self._watchers:
            await self.step(await self._feed.visible_pool())
        missed = self._since(seq) if feed == self._id else None
        if missed is None:
            head = {"type": "state", "feed": self._id, "seq": self._seq, "at": now()}
            watcher.send(_json({**head, **self._state}))
        else:
            watcher.send(_json({"type": "resumed", "feed": self._id, "seq": seq, "at": now()}))
            for delta in missed:
                watcher.send(delta)
        self._watchers.append(watcher)
        self._feed.settle(self._scope, self)

    def leave(self, watcher: Watcher) -> None:
        """Send that watcher nothing more."""
        if watcher in self._watchers:
            self._watchers.remove(watcher)
            self._feed.settle(self._scope, self)

    def end(self, reason: str) -> None:
        """Close every watcher's connection, because the pool cannot be read."""
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            watcher.end(reason)

    async def step(self, visible_pool: VisiblePool) -> None:
        """Send what has changed since the last step. Raises PoolError."""
        async with self._stepping:
            if self._visible_pool is visible_pool:
                return
            state = visible_pool.narrow(self._scope, self._visible_pool, self._state)
            changes = difference(self._state, state) if self._visible_pool is not None else None
            for lease_id, lease in (changes or {}).get("leases", {}).items():
                if lease is None:
                    changes["leases"][lease_id] = await self._ended(lease_id)  # type: ignore[index]
            self._visible_pool, self._state = visible_pool, state
            if changes is None:
                return  # nothing has been sent yet
            self._seq += 1
            delta = _json({"type": "delta", "seq": self._seq, "at": now(), **changes})
            self._deltas.append((self._seq, delta))
            for watcher in list(self._watchers):
                watcher.send(delta)

    def _since(self, seq: int) -> list[str] | None:
        """Return the deltas after ``seq``, or None if some are no longer kept."""
        oldest = self._seq - len(self._deltas)
        return [text for n, text in self._deltas if n > seq] if oldest <= seq <= self._seq else None

    async def _ended(self, lease_id: str) -> dict[str, Any] | None:
        """Return a lease that has ended, so that watchers can show how; None if it cannot be read."""
        try:
            return lease_json(await self._feed.pool.wait(lease_id, self._scope, 0))
        except PoolError:
            return None


def _json(message: dict[str, Any]) -> str:
    return json.dumps(message, separators=(",", ":"))

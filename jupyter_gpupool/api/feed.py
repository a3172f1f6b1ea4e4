"""The pool as those who watch it are told: its whole state once, then what has changed.

The pool is read once for all who watch, and not at all while nobody does. Each scope (whose leases may be seen) has a
view of its own: it numbers its deltas and remembers the last ones, so that who lost the connection goes on where
they were.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from ..pool.errors import PoolError
from ..pool.models import Lease
from ..pool.namespaces import Namespaces
from .sight import Sight, difference, now, told_of

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
    async def look(self) -> tuple[dict[str, Any], list[Lease], Namespaces]: ...
    async def wait(self, lease_id: str, owner: str | None, wait_s: float) -> Lease: ...
    def listen(self, callback: Callable[[dict[str, Any]], None]) -> Callable[[], None]: ...


class Watcher(Protocol):
    """Who is told."""

    def tell(self, message: str) -> None:
        """JSON. Must neither wait nor raise."""

    def end(self, reason: str) -> None:
        """The pool cannot be read; try again later."""


class Feed:
    """The views of one pool."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._views: dict[str | None, View] = {}
        self._sight: Sight | None = None  # the last one, while somebody watches
        self._looking = asyncio.Lock()
        self._follower: asyncio.Task | None = None
        self._stirred = asyncio.Event()

    def view(self, owner: str | None) -> View:
        """What ``owner`` sees, or (None) everything."""
        scope = None if owner is None else self.pool.scope(owner)
        view = self._views.pop(scope, None) or View(self, scope)
        self._views[scope] = view  # the newest last
        for old in [s for s, v in self._views.items() if not v.watched][: len(self._views) - _MOST_VIEWS]:
            del self._views[old]
        return view

    async def sight(self) -> Sight:
        """As it was a moment ago, if somebody watches, else as it is. Raises PoolError."""
        return self._sight or await self._look()

    def settle(self, scope: str | None, view: View) -> None:
        """Somebody came to that view, or left it."""
        self._views.setdefault(scope, view)
        watched = any(view.watched for view in self._views.values())
        if watched and (self._follower is None or self._follower.done()):
            self._follower = asyncio.create_task(self._follow())
        elif not watched and self._follower is not None:
            self._follower.cancel()
            self._follower = None
            self._sight = None

    async def _look(self) -> Sight:
        async with self._looking:
            return Sight(*await self.pool.look(), self._sight)

    async def _follow(self) -> None:
        stop = self.pool.listen(lambda change: self._stirred.set())
        try:
            while True:
                self._sight = await self._look()
                for view in list(self._views.values()):
                    if view.watched:
                        await view.step(self._sight)
                try:
                    await asyncio.wait_for(self._stirred.wait(), SAMPLE_S)
                except (TimeoutError, asyncio.TimeoutError):
                    continue
                self._stirred.clear()
                await asyncio.sleep(_GATHER_S)
        except (PoolError, RuntimeError) as e:  # RuntimeError: its thread has ended
            self._sight = None
            for view in self._views.values():
                view.end(str(e))
        finally:
            stop()


class View:
    """What one scope sees of the pool."""

    def __init__(self, feed: Feed, scope: str | None) -> None:
        self._feed = feed
        self._scope = scope
        self._id = uuid.uuid4().hex
        self._seq = 0
        self._sight: Sight | None = None
        self._state: dict[str, Any] = {}  # what was told of it
        self._deltas: deque[tuple[int, str]] = deque(maxlen=_REMEMBERED)
        self._watchers: list[Watcher] = []
        self._stepping = asyncio.Lock()

    @property
    def watched(self) -> int:
        """How many do."""
        return len(self._watchers)

    async def join(self, watcher: Watcher, feed: str = "", seq: int = -1) -> None:
        """Tell the watcher the state, or what it missed since ``seq`` of ``feed``. Raises PoolError."""
        if not self._watchers:
            await self.step(await self._feed.sight())
        missed = self._since(seq) if feed == self._id else None
        if missed is None:
            head = {"type": "state", "feed": self._id, "seq": self._seq, "at": now()}
            watcher.tell(_json({**head, **self._state}))
        else:
            watcher.tell(_json({"type": "resumed", "feed": self._id, "seq": seq, "at": now()}))
            for delta in missed:
                watcher.tell(delta)
        self._watchers.append(watcher)
        self._feed.settle(self._scope, self)

    def leave(self, watcher: Watcher) -> None:
        if watcher in self._watchers:
            self._watchers.remove(watcher)
            self._feed.settle(self._scope, self)

    def end(self, reason: str) -> None:
        """The pool cannot be read."""
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            watcher.end(reason)

    async def step(self, sight: Sight) -> None:
        """Tell what that is other than before. Raises PoolError."""
        async with self._stepping:
            if self._sight is sight:
                return
            state = sight.narrow(self._scope, self._sight, self._state)
            changes = difference(self._state, state) if self._sight is not None else None
            for lease_id, lease in (changes or {}).get("leases", {}).items():
                if lease is None:
                    changes["leases"][lease_id] = await self._ended(lease_id)  # type: ignore[index]
            self._sight, self._state = sight, state
            if changes is None:
                return  # nobody has been told anything yet
            self._seq += 1
            delta = _json({"type": "delta", "seq": self._seq, "at": now(), **changes})
            self._deltas.append((self._seq, delta))
            for watcher in list(self._watchers):
                watcher.tell(delta)

    def _since(self, seq: int) -> list[str] | None:
        """The deltas after ``seq``, if all of them are remembered."""
        oldest = self._seq - len(self._deltas)
        return [text for n, text in self._deltas if n > seq] if oldest <= seq <= self._seq else None

    async def _ended(self, lease_id: str) -> dict[str, Any] | None:
        """How a lease ended, which those who watch may want to say."""
        try:
            return told_of(await self._feed.pool.wait(lease_id, self._scope, 0))
        except PoolError:
            return None


def _json(message: dict[str, Any]) -> str:
    return json.dumps(message, separators=(",", ":"))

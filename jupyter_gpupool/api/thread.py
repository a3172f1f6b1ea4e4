"""The one thread on which a pool's manager and ledger are used.

What is asked while the thread is busy waits, and is then done together where that can be: in one transaction of the
ledger, so that many requests share one commit. Nobody is answered before that commit.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..pool.errors import PoolError
from ..pool.ledger import Ledger

T = TypeVar("T")

#: How many calls share one commit at most.
_MOST = 128


@dataclass
class _Call:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    together: bool
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future
    context: contextvars.Context  # who is acting, for the audit trail
    new_id: str = ""
    value: Any = None
    error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value, self.error = self.context.run(self.function, *self.args), None
        except BaseException as e:
            self.value, self.error = None, e

    def answer(self) -> None:
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.value)


class ManagerThread:
    """Calls functions in the order in which they are asked for."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self.ledger: Ledger | None = None  # whose commits are shared
        #: is told, on that thread, how long a transaction of the ledger took, in seconds
        self.timed: Callable[[float], None] = lambda seconds: None

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """What the function returns, or raises."""
        return await self._ask(function, args, False)

    async def together(self, function: Callable[..., T], *args: Any, new_id: str = "") -> T:
        """The same of a change or a question of the manager that may share a transaction with others. ``new_id``: what
        it is to be the id of is not likely to be in the ledger yet."""
        return await self._ask(function, args, True, new_id)

    def stop(self) -> None:
        """After what has been asked for."""
        self._stopped = True
        self._calls.put(None)

    async def _ask(
        self, function: Callable[..., T], args: tuple[Any, ...], together: bool, new_id: str = ""
    ) -> T:
        if self._stopped:
            raise PoolError("the pool is not running any more")
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="gpupool-manager", daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        call = _Call(function, args, together, loop, loop.create_future(), contextvars.copy_context(), new_id)
        self._calls.put(call)
        return await call.future

    def _work(self) -> None:
        left: _Call | None = None
        while (first := left or self._calls.get()) is not None:
            some, left, over = [first], None, False
            while first.together and len(some) < _MOST and not self._calls.empty():
                following = self._calls.get()
                if following is None:
                    over = True
                    break
                if not following.together:
                    left = following
                    break
                some.append(following)
            began = time.perf_counter()
            self._run(some)
            self.timed(time.perf_counter() - began)
            first.loop.call_soon_threadsafe(_answer, some)
            if over:
                return

    def _run(self, some: list[_Call]) -> None:
        if len(some) > 1 and self.ledger is not None:
            try:
                with self.ledger.together([call.new_id for call in some if call.new_id]):
                    for call in some:
                        call.run()
                        if isinstance(call.error, BaseException) and not _alone(call.error):
                            raise call.error
                return
            except Exception:
                pass  # none of them has happened; each gets its own answer
        for call in some:
            call.run()


def _alone(error: BaseException) -> bool:
    """Whether the error is that one call's, which has been undone, and not the ledger's."""
    return isinstance(error, PoolError) and error.status < 500


def _answer(some: list[_Call]) -> None:
    for call in some:
        call.answer()

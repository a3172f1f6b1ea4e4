"""The one thread on which a pool's manager and ledger are used.

Calls that arrive while the thread is busy wait, and then share one transaction of the ledger where they may. No call
is answered before its transaction is committed.
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

from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.pool.ledger.ledger import Ledger

T = TypeVar("T")

#: The most calls that share one commit.
_MAX_CALLS_PER_COMMIT = 128


@dataclass
class _Call:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    together: bool
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    context: contextvars.Context  # holds the acting user, for the audit trail
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
    """Runs functions one at a time, in the order of the calls."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self.ledger: Ledger | None = None  # whose commits are shared
        #: Called on that thread with the duration of each transaction of the ledger, in seconds.
        self.timed: Callable[[float], None] = lambda seconds: None

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function in a transaction of its own; return what it returns."""
        value: T = await self._ask(function, args, False)
        return value

    async def together(self, function: Callable[..., T], *args: Any, new_id: str = "") -> T:
        """Run a function that may share a transaction with other calls.

        ``new_id``: the id that the call will create, if any. It is taken not to be in the ledger yet.
        """
        value: T = await self._ask(function, args, True, new_id)
        return value

    def stop(self) -> None:
        """End the thread after the calls that were made before."""
        self._stopped = True
        self._calls.put(None)

    async def _ask(
        self, function: Callable[..., Any], args: tuple[Any, ...], together: bool, new_id: str = ""
    ) -> Any:
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
            while first.together and len(some) < _MAX_CALLS_PER_COMMIT and not self._calls.empty():
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
                pass  # the transaction was rolled back; now run each call by itself
        for call in some:
            call.run()


def _alone(error: BaseException) -> bool:
    """Whether the error concerns that one call, which has been undone, and not the ledger."""
    return isinstance(error, PoolError) and error.status < 500


def _answer(some: list[_Call]) -> None:
    for call in some:
        call.answer()

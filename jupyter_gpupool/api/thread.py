"""The one thread on which a pool's manager and ledger are used."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class ManagerThread:
    """Calls functions one after the other."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gpupool-manager")
        #: is told, on that thread, how long a transaction of the ledger took, in seconds
        self.timed: Callable[[float], None] = lambda seconds: None

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """What the function returns, or raises."""
        context = contextvars.copy_context()  # who is acting, for the audit trail

        def run() -> T:
            began = time.perf_counter()
            try:
                return context.run(function, *args)
            finally:
                self.timed(time.perf_counter() - began)

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def stop(self) -> None:
        self._thread.shutdown(wait=False)

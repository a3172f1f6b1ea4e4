"""Gives workers a renewed certificate: in their sandbox they cannot read its files."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import Callable, Iterable
from logging import LoggerAdapter
from pathlib import Path
from typing import Any

from jupyter_gpupool.core.errors import EngineError

from .worker_controls import WorkerChannel
from .worker_tasks import WorkerTasks

#: How often the files are looked at, in seconds.
_CHECK_INTERVAL_S = 2.0


class Renewal:
    """``workers`` has the ids of the leases with a worker, ``channel`` the connection to each."""

    def __init__(
        self, workers: Callable[[], Iterable[str]], channel: Callable[[str], WorkerChannel], log: Any
    ) -> None:
        self._workers = workers
        self._channel = channel
        self._log: LoggerAdapter[Any] = log
        #: what each worker has been given; what it has read by itself, an earlier pool's may have long ago
        self._given: dict[str, tuple[bytes, ...]] = {}
        self._giving = WorkerTasks(log)
        self._watching: asyncio.Task[None] | None = None

    def start(self, certfile: str, keyfile: str) -> None:
        """Watch these files."""
        watching = self._watch(Path(certfile), Path(keyfile))
        self._watching = asyncio.get_running_loop().create_task(watching)

    async def stop(self) -> None:
        """Stop watching."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
            self._watching = None
        await self._giving.stop()

    async def _watch(self, *files: Path) -> None:
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            found = _contents(files)
            workers = set(self._workers())
            self._given = {lease_id: self._given.get(lease_id, ()) for lease_id in workers}
            for lease_id in workers:
                if found and self._given[lease_id] != found:
                    self._giving.start(lease_id, functools.partial(self._give, contents=found))

    async def _give(self, lease_id: str, contents: tuple[bytes, ...]) -> None:
        try:
            with contextlib.ExitStack() as closing:
                descriptors = []
                for content in contents:
                    descriptors.append(os.memfd_create("certificate", os.MFD_CLOEXEC))
                    closing.callback(os.close, descriptors[-1])
                    os.write(descriptors[-1], content)
                await self._channel(lease_id).ask("certificate", descriptors)
        except EngineError as e:  # it is about to end, or the two files are of two certificates for a moment
            self._log.debug("The worker of lease %s cannot take the renewed certificate: %s", lease_id, e)
        except OSError as e:
            self._log.warning("The worker of lease %s is not given the certificate: %s", lease_id, e.strerror)
        else:
            self._given[lease_id] = contents


def _contents(files: Iterable[Path]) -> tuple[bytes, ...]:
    """What the files have; nothing if one of them cannot be read."""
    try:
        return tuple(file.read_bytes() for file in files)
    except OSError:
        return ()

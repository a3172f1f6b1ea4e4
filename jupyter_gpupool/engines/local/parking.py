"""Parks the workers of this machine: their memory goes to the arena, their processes and connections stay.

It comes back on the same GPUs, or, where they are emulated, on others. Leases with real GPUs are not parked yet: a
process cannot leave a GPU for another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from logging import LoggerAdapter
from typing import Any

from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.core.models import Lease
from jupyter_gpupool.transport.specs import DeviceSpec

from .arena import Arena, ArenaFull
from .worker_answers import time_limit_s
from .worker_controls import WorkerChannel
from .worker_tasks import WorkerTasks

_MIB = 1 << 20
#: How often workers are asked whether they compute, in seconds.
_IDLE_CHECK_INTERVAL_S = 5.0
#: How often the pool is reminded that a parked lease is needed, in seconds: it may not have known it as parked yet.
_REMINDER_INTERVAL_S = 0.5


class Parking:
    """``arena`` None: nothing is parked. ``folder`` has the workers' sockets."""

    def __init__(self, folder: str, clean_after_s: float, log: Any) -> None:
        self._folder = folder
        self._clean_after_s = clean_after_s
        self._log: LoggerAdapter[Any] = log
        self.arena: Arena | None = None
        #: called with the id of a parked lease that needs its GPUs
        self.on_wake: Callable[[str], None] = lambda lease_id: None
        #: called with the id of a lease, and the name of another worker of it that its worker asks to be linked to
        self.on_link: Callable[[str, str], None] = lambda lease_id, peer: None
        #: the leases whose state is in the arena
        self.parked: set[str] = set()
        #: the leases of which the arena has a copy that was up to date when their workers were last asked
        self.clean: set[str] = set()
        #: parked leases that somebody waits for
        self._wanted: set[str] = set()
        self._channels: dict[str, WorkerChannel] = {}
        self._cleaning = WorkerTasks(log)
        self._watching: asyncio.Task[None] | None = None

    async def start(self, memory_mib: int, workers: Callable[[], Iterable[str]]) -> None:
        """Reserve so many MiB. ``workers`` has the ids of the leases with a worker. Raises EngineError."""
        if memory_mib <= 0:
            return
        arena = Arena(memory_mib, self._log)
        started = time.monotonic()
        try:
            await arena.reserve()
        except OSError as e:
            raise EngineError(
                f"park_memory_mib={memory_mib}: that much host memory cannot be reserved ({e.strerror}); "
                "choose less, or 0 to park nothing"
            ) from None
        self._log.info(
            "Reserved %d MiB for parked leases in %.1f s", arena.memory_mib, time.monotonic() - started
        )
        self.arena = arena
        self._watching = asyncio.get_running_loop().create_task(self._watch(workers))

    async def stop(self) -> None:
        """Hang up, and give the memory back."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
            self._watching = None
        await self._cleaning.stop()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self._wanted.clear()
        self.parked.clear()
        self.clean.clear()
        if self.arena is not None:
            await self.arena.close()
            self.arena = None

    def lent_mib(self, lease_id: str) -> int:
        """The host memory that a lease has of the arena."""
        return 0 if self.arena is None else self.arena.lent_mib(lease_id)

    def ended(self, lease_id: str) -> None:
        """A worker has ended."""
        channel = self._channels.pop(lease_id, None)
        if channel is not None:
            channel.close()
        self._wanted.discard(lease_id)
        self.parked.discard(lease_id)
        self.clean.discard(lease_id)
        if self.arena is not None:
            self.arena.release(lease_id)

    async def adopt(self, lease_ids: Iterable[str]) -> None:
        """Ask the workers of an earlier pool which are parked; one may wait for its GPUs already."""
        await asyncio.gather(*map(self._adopt, lease_ids))

    async def _adopt(self, lease_id: str) -> None:
        with contextlib.suppress(EngineError):
            state = await self.channel(lease_id).ask("state")
            (self.parked.add if state["parked"] else self.parked.discard)(lease_id)
            self._remind(lease_id)

    async def park(self, lease_id: str) -> int:
        """Park a lease's memory, and return the MiB that are kept for it. Raises EngineError."""
        channel = self.channel(lease_id)
        await self._lend(lease_id, channel, make_room=True)
        await channel.ask("park")
        self.parked.add(lease_id)
        if lease_id in self._wanted:  # somebody came while it was parked
            asyncio.get_running_loop().call_soon(self._remind, lease_id)
        assert self.arena is not None, "_lend has used it"
        return self.arena.lent_mib(lease_id)

    async def resume(self, lease: Lease, devices: Sequence[DeviceSpec]) -> None:
        """Bring a lease's memory back, onto these slices. Raises EngineError."""
        channel = self.channel(lease.id)
        self._wanted.discard(lease.id)
        await channel.ask("resume", devices=[asdict(device) for device in devices])
        self.parked.discard(lease.id)

    def channel(self, lease_id: str) -> WorkerChannel:
        """The connection to a worker. Raises EngineError."""
        known = self._channels.get(lease_id)
        if known is not None and known.is_open:
            return known
        try:
            channel = WorkerChannel(self._folder, lease_id, lambda notice: self._on_notice(lease_id, notice))
        except OSError as e:
            raise EngineError(f"the worker of lease {lease_id} cannot be asked: {e.strerror}") from None
        self._channels[lease_id] = channel
        return channel

    def _on_notice(self, lease_id: str, notice: dict[str, Any]) -> None:
        if "parked" in notice:
            (self.parked.add if notice["parked"] else self.parked.discard)(lease_id)
        if "link" in notice:
            self.on_link(lease_id, notice["link"])
        if notice.get("wanted") and lease_id not in self._wanted:
            self._wanted.add(lease_id)
            if lease_id in self.parked:
                self._remind(lease_id)

    def _remind(self, lease_id: str) -> None:
        if lease_id in self._wanted and lease_id in self.parked:
            self.on_wake(lease_id)
            asyncio.get_running_loop().call_later(_REMINDER_INTERVAL_S, self._remind, lease_id)

    async def _lend(self, lease_id: str, channel: WorkerChannel, make_room: bool) -> None:
        """Lend a worker what a copy of its memory takes. Raises EngineError."""
        if self.arena is None:
            raise EngineError("no host memory is reserved for parked leases; set park_memory_mib")
        state = await channel.ask("state")
        # A worker of an earlier pool has memory of that one's arena.
        inherited_mib = state["lent"] // _MIB - self.arena.lent_mib(lease_id)
        wanted_mib = -(-state["bytes"] // _MIB) - inherited_mib
        while True:
            try:
                await channel.lend(self.arena.lend(lease_id, wanted_mib))
                return
            except ArenaFull:
                others = self.arena.lenders(lease_id, *self.parked) if make_room else []
                if not others or not await self._take_back(others):
                    raise EngineError(
                        f"{wanted_mib} MiB of host memory are needed to park lease {lease_id}, and only "
                        f"{self.arena.free_mib} of {self.arena.memory_mib} MiB are free"
                    ) from None

    async def _take_back(self, lease_ids: Sequence[str]) -> bool:
        """Take memory back from the first of these leases that can do without it. False if none can."""
        for lease_id in lease_ids:
            try:
                # Nor is what it was asked before waited for.
                await asyncio.wait_for(self.channel(lease_id).ask("forget"), time_limit_s("forget"))
            except (EngineError, TimeoutError, asyncio.TimeoutError):
                continue
            self.clean.discard(lease_id)
            assert self.arena is not None, "it has been lent"
            await self.arena.release(lease_id)
            return True
        return False

    async def _watch(self, workers: Callable[[], Iterable[str]]) -> None:
        while True:
            await asyncio.sleep(_IDLE_CHECK_INTERVAL_S)
            for lease_id in list(workers()):
                if lease_id not in self.parked:
                    self._cleaning.start(lease_id, self._clean_if_possible)

    async def _clean_if_possible(self, lease_id: str) -> None:
        with contextlib.suppress(EngineError):  # it has ended, or there is no room: it is not clean
            await self.clean_if_idle(lease_id)

    async def clean_if_idle(self, lease_id: str) -> None:
        """Copy the memory of a lease that has not computed for a while, so that parking it takes no time later.

        Raises EngineError.
        """
        channel = self.channel(lease_id)
        state = await channel.ask("state")
        if state["parked"]:
            return
        clean = state["clean"]
        if not clean and state["idle_s"] >= self._clean_after_s:
            await self._lend(lease_id, channel, make_room=False)
            clean = (await channel.ask("clean"))["clean"]
        (self.clean.add if clean else self.clean.discard)(lease_id)

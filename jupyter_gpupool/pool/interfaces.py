"""The seam between the pool and where workers run. ``engines/`` holds the implementations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ..devices.readings import ServerReading
from .models import Lease, LeaseState, Server, WorkerAddress, WorkerUsage

#: Called (in the event loop's thread) when a worker has ended: lease id, the state that follows
#: (RELEASED: its holder left; EXPIRED: never attached, or silent beyond its TTL; LOST: it died),
#: and one line for people.
WorkerExit = Callable[[str, LeaseState, str], None]

#: Called (there too) with all GPU servers that there are now, whenever that has changed.
ServersChanged = Callable[[Sequence[Server]], None]


class Engine(Protocol):
    """Runs one worker per lease."""

    #: Whether workers outlive a pool that ends or is killed.
    persistent: bool

    async def start(self, on_exit: WorkerExit, on_servers: ServersChanged = lambda servers: None) -> None:
        """Get ready to start workers (the local engine starts its warm parent). Raises EngineFailure."""

    async def servers(self) -> Sequence[Server]:
        """The GPU servers and GPUs that this engine can run workers on."""

    async def start_worker(self, lease: Lease) -> WorkerAddress:
        """Start the worker of a granted lease. Raises :class:`~.errors.EngineFailure`."""

    async def stop_worker(self, lease_id: str) -> None:
        """End that worker and return when it is gone; without such a worker, do nothing."""

    async def limit_worker(self, lease_id: str, limits: Mapping[str, int]) -> None:
        """Have a worker keep to so many MiB by GPU uuid. Raises :class:`~.errors.InUse` if it uses more, and
        :class:`~.errors.EngineFailure` if it does not answer; then it keeps to what it kept to."""

    async def adopt(self, leases: Sequence[Lease]) -> dict[str, WorkerAddress]:
        """After a restart: find the workers of ``leases`` that still run, end all other workers."""

    def usage(self) -> dict[str, WorkerUsage]:
        """What each running worker last said it uses, by lease id."""

    def readings(self) -> Sequence[ServerReading]:
        """What each GPU server last said of its health, as far as it has been read; answers at once."""

    async def stop(self) -> None:
        """End the engine itself and, unless they are persistent, every worker. It may be started again."""

    @property
    def listens_on(self) -> int:
        """The number of the one port that all workers of a server are behind; 0 where each has its own."""

    @property
    def warm(self) -> bool:
        """Whether the next worker starts at once."""

    @property
    def failure(self) -> str:
        """Why no worker can be started, one line; empty while nothing speaks against it."""

"""The interface between the pool and the engines, which run the workers. ``engines/`` contains the implementations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from .models import Lease, LeaseState, Server, WorkerAddress, WorkerUsage
from .readings import ServerReading

#: Called in the event loop's thread when a worker has ended, with the lease id, the lease's new state and one line
#: for people. RELEASED: the holder left; EXPIRED: nobody attached, or the holder was silent beyond the TTL;
#: LOST: the worker died.
WorkerExit = Callable[[str, LeaseState, str], None]

#: Called in the event loop's thread when another worker has taken the place of one that ended by what it computed, with
#: the lease id, the new worker and one line for people: why the former one ended.
WorkerReplaced = Callable[[str, WorkerAddress, str], None]

#: Called in the event loop's thread with all present GPU servers, whenever they have changed.
ServersChanged = Callable[[Sequence[Server]], None]


class Engine(Protocol):
    """Runs one worker per lease."""

    #: Whether workers outlive a pool that ends or is killed.
    persistent: bool

    async def start(self, on_exit: WorkerExit, on_servers: ServersChanged = lambda servers: None) -> None:
        """Prepare to start workers (the local engine starts its zygote). Raises EngineError."""

    async def servers(self) -> Sequence[Server]:
        """Return the GPU servers, with their GPUs, on which this engine can run workers."""

    async def start_worker(self, lease: Lease) -> WorkerAddress:
        """Start the worker of a granted lease. Raises :class:`~.errors.EngineError`."""

    async def stop_worker(self, lease_id: str) -> None:
        """End that worker and return when it has ended; do nothing if there is none."""

    async def limit_worker(self, lease_id: str, limits: Mapping[str, int]) -> None:
        """Have a worker keep to so many MiB by GPU uuid. Raises :class:`~.errors.SliceInUse` if it uses more, and
        :class:`~.errors.EngineError` if it does not answer; then it keeps to what it kept to."""

    async def adopt(self, leases: Sequence[Lease]) -> dict[str, WorkerAddress]:
        """After a restart, return the running workers of ``leases``, and end all other workers."""

    def usage(self) -> dict[str, WorkerUsage]:
        """Return the usage that each running worker last reported, by lease id."""

    def readings(self) -> Sequence[ServerReading]:
        """Return the last health reading of each GPU server that has one. Never blocks."""

    async def stop(self) -> None:
        """Stop the engine and, unless they are persistent, all workers. It may be started again."""

    @property
    def listens_on(self) -> int:
        """The port that all workers of a server share; 0 if each has its own."""

    @property
    def warm(self) -> bool:
        """Whether the next worker can start without delay."""

    @property
    def failure(self) -> str:
        """Why no worker can be started, in one line; empty if workers can be started."""


@runtime_checkable
class ReplacingEngine(Protocol):
    """What an engine may offer besides: to replace a worker that ended by what it computed, on the same slices.

    The new worker is reached where the former one was. If none can be started, ``on_exit`` is called.
    """

    def on_replaced(self, replaced: WorkerReplaced) -> None:
        """Call ``replaced`` for each worker that has taken another one's place."""


@dataclass(frozen=True)
class WorkerState:
    """What a worker would have to copy: ``used_mib`` of GPU memory. ``is_clean``: its arena has a copy that is up to
    date, so that parking it copies nothing. ``by_server``: the MiB on each server of a lease that spans servers."""

    used_mib: int
    is_clean: bool = False
    by_server: Mapping[str, int] = field(default_factory=dict, hash=False)


@runtime_checkable
class ParkingEngine(Protocol):
    """What an engine may offer besides: to park a worker's state in host memory, and to resume it.

    The pool decides (:mod:`jupyter_gpupool.pool.scheduling.planner`), writes its decision to the ledger, and then calls
    one of these methods. Each call is about one lease, and there is at most one call about a lease at a time.

    - **Parking.** ``park_worker(lease)``: when it returns, the worker has let go of its GPUs and the arena has
      everything: only then the pool gives them to others. If it raises, the worker goes on, and the pool keeps its
      slices. Of a lease that spans servers all workers are parked, or none.
    - **Resuming.** ``resume_worker(lease)``: ``lease.slices`` are those that it has now, of the same models and on the
      same servers. It returns the worker, as ``start_worker`` does. If it raises, the lease is LOST. The engine asks
      for it by calling what :meth:`on_wake` was given, again and again, when an operator needs a parked lease's GPUs.
    - **Ends.** ``stop_worker`` ends the worker and what is parked, at any time. A call that is under way then raises.
    """

    def on_wake(self, wake: Callable[[str], None]) -> None:
        """Call ``wake(lease_id)`` in the event loop's thread when a parked lease needs its GPUs."""

    def states(self) -> Mapping[str, WorkerState]:
        """Return what each worker that could be parked or moved now would have to copy, by lease id."""

    def arenas(self) -> Mapping[str, int]:
        """Return the MiB of host memory for parked leases of each server that has some, by its name."""

    def parked(self) -> Collection[str]:
        """Return the ids of the leases whose state is in an arena."""

    async def park_worker(self, lease: Lease) -> int:
        """Park a worker, and return the MiB that its state takes. Raises :class:`~.errors.EngineError`."""

    async def resume_worker(self, lease: Lease) -> WorkerAddress:
        """Start a worker with the state that is parked. Raises :class:`~.errors.EngineError`."""


@runtime_checkable
class MovingEngine(Protocol):
    """What an engine with several GPU servers may offer besides: to move a worker to another server.

    ``move_worker(lease)``: the lease holds ``lease.arriving`` besides what it has, on another server, in place of
    ``lease.leaving``; what a lease that spans servers has on others stays. It returns the new worker once that one has
    everything and clients have been sent there. If it raises, the old one goes on, and the new one has ended. A parked
    lease runs then. ``stop_worker`` ends both workers at any time, and then ``move_worker`` raises. ``adopt`` ends the
    second workers of moves that were under way, unless only the second one is left; :meth:`arrived` names those leases.
    """

    async def move_worker(self, lease: Lease) -> WorkerAddress:
        """Move a worker to ``lease.moving_to``. Raises :class:`~.errors.EngineError`."""

    def arrived(self) -> Collection[str]:
        """Return the ids of the leases that :meth:`Engine.adopt` has found on ``lease.moving_to``."""

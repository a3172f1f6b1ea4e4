"""One running pool: a manager on a thread of its own, an engine, and the calls that clients make."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jupyter_core.paths import jupyter_data_dir
from traitlets import Any as AnyTrait
from traitlets import Bool, Enum, Float, Int, Unicode, default
from traitlets.config import LoggingConfigurable

from jupyter_gpupool.core.engine import Engine, ReplacingEngine
from jupyter_gpupool.core.errors import ImpossibleRequest, PoolError, PoolUnreachable, UnknownServer
from jupyter_gpupool.core.models import Change, Lease, LeaseState, Reclaim, Request, Server, WorkerUsage
from jupyter_gpupool.core.validation import is_id
from jupyter_gpupool.engines.registry import ENGINES, engine_class
from jupyter_gpupool.former_names import FormerNames
from jupyter_gpupool.pool.ledger.file_lock import LedgerLock, ledger_file
from jupyter_gpupool.pool.ledger.leader_lock import Leadership
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager
from jupyter_gpupool.pool.reclaim import ReclaimPolicy
from jupyter_gpupool.pool.scheduling.destination import immovable
from jupyter_gpupool.pool.scheduling.policy import FEW_SERVERS, POLICIES
from jupyter_gpupool.pool.scheduling.quotas import QueueLimits
from jupyter_gpupool.pool.tenancy.namespaces import Namespaces
from jupyter_gpupool.pool.usage_history import History
from jupyter_gpupool.server.watch.snapshot import forecast_json, pool_snapshot, uses

from . import traces
from .health_monitor import Check, Health
from .leader_election import LeaderElection
from .lease_listeners import Listeners
from .lease_waiters import Waiters
from .manager_access import ManagerAccess
from .manager_thread import ManagerThread
from .moving import Moving
from .reclaiming import Reclaiming
from .resize import Resizing
from .servers import ServerList
from .tenants import Tenants
from .workers import Workers

__all__ = ["Check", "PoolService"]

T = TypeVar("T")

#: Seconds between two checks for leases that have expired.
_TICK_INTERVAL_S = 0.5


class PoolService(FormerNames, LoggingConfigurable):
    """A pool of the GPUs that its engine offers.

    All methods raise :mod:`jupyter_gpupool.core.errors`.
    """

    former_traits = {"audit_days": "audit_retention_days"}

    db_url = Unicode(
        help="Database URL of the ledger. Default: an SQLite file in Jupyter's data directory."
    ).tag(config=True)
    ttl_s = Float(
        15.0,
        min=1.0,
        help="Seconds that a request in the queue outlives its holder's last heartbeat; a lease outlives it by the "
        "engine's `resume_s`, if that is longer.",
    ).tag(config=True)
    audit_retention_days = Float(
        90.0, min=0.0, help="Days for which entries of the audit trail are kept."
    ).tag(config=True)
    reclaim = Enum(
        [choice.value for choice in Reclaim],
        Reclaim.NEVER.value,
        help="Whether leases may be parked in host memory while others wait for their GPUs: `never`, or once they are "
        "`idle`. A namespace may choose otherwise. The engine needs `park_memory_mib`.",
    ).tag(config=True)
    move_for_others = Bool(
        False,
        help="Whether leases are moved to other GPU servers to make room for a request that waits. The engine must be "
        "able to move leases.",
    ).tag(config=True)
    oversubscribe = Float(
        2.0,
        min=1.0,
        help="How many times the pool's GPUs all leases may hold together, those that are parked included: nobody is "
        "parked for a request beyond that. 1: for no request.",
    ).tag(config=True)
    reclaim_after_s = Float(
        300.0, min=0.0, help="Seconds that a lease must have been idle before it may be parked."
    ).tag(config=True)
    min_resident_s = Float(
        60.0, min=0.0, help="Seconds that a lease keeps its GPUs at least, once it has them or has them back."
    ).tag(config=True)
    queued_per_user = Int(
        200, min=0, help="How many requests of one user may wait in the queue at once. 0: any number."
    ).tag(config=True)
    queued_per_namespace = Int(
        2000, min=0, help="How many requests of one namespace may wait in the queue at once. 0: any number."
    ).tag(config=True)
    engine_name = Enum(
        list(ENGINES),
        help="Where workers run: on this machine, or (`ray`) on a Ray cluster. Default: GPUPool.engine, else `local`.",
    ).tag(config=True)
    placement_policy = Enum(
        list(POLICIES),
        default_value=FEW_SERVERS.name,
        help="Which GPUs a request gets among those that have room. `few_servers`: those that are left with the least "
        "memory, on as few servers as possible, so that large requests find room. `spread`: those that are left with "
        "the most memory, on as many servers as the request allows, so that leases disturb each other least.",
    ).tag(config=True)
    engine: Any = AnyTrait(help="A jupyter_gpupool.core.engine.Engine.")

    @default("engine_name")
    def _default_engine_name(self) -> str:
        name: str = self.config.get("GPUPool", {}).get("engine") or "local"
        return name

    @default("db_url")
    def _default_db_url(self) -> str:
        return f"sqlite:///{Path(jupyter_data_dir()) / 'gpupool' / 'ledger.sqlite'}"

    @default("engine")
    def _default_engine(self) -> Engine:
        file = ledger_file(self.db_url)
        engine: Engine = engine_class(self.engine_name)(parent=self, pool_id=str(file or self.db_url))
        return engine

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.thread = ManagerThread()
        self._lock: LedgerLock | None = None
        self._ledger: Ledger | None = None
        self._manager: Manager | None = None
        self._history: History | None = None
        self._waiters = Waiters()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None
        self._health_task: asyncio.Task[None] | None = None
        self._election: LeaderElection | None = None  # where several daemons share the ledger
        self._has_servers = True  # those of an engine that only a leader starts are not known while following
        self.address = ""  # the URL of this pool
        #: called regularly with what each worker reports, by lease id
        self.on_usage: Callable[[Mapping[str, WorkerUsage]], None] = lambda usage: None
        self._stopping = False
        self._refuses_requests = False
        self._resizing = Resizing(self._call, self._run)
        self._listeners = Listeners(self.log)
        self._servers = ServerList(self._change, self._spawn, self.log)
        access = ManagerAccess(self._call, self._change, lambda: self._manager, self._spawn, self.log)
        self.moving = Moving(self.engine, access)
        self._workers = Workers(
            self.engine,
            self._together,
            lambda: self._manager,
            self._spawn,
            self.moving.carry_out,
            self.log,
        )
        self.reclaiming = Reclaiming(self.engine, access)
        self.moving.parking = self.reclaiming.parking
        self.health_monitor = Health(
            self.engine, self.with_ledger, lambda: self._servers_changed(self.health_monitor.servers)
        )
        self.tenants = Tenants(self.with_ledger, self.with_manager, self.carry_out, self.namespaces)

    # -- life

    async def start(self) -> None:
        """Open the ledger, adopt its live leases, and start to grant. Raises PoolError."""
        file = ledger_file(self.db_url)
        if file is not None:
            self._lock = LedgerLock(file)
            self._lock.acquire()
        try:
            self._manager = await self._call(self._open)
            if self._ledger is not None and self._ledger.shared:
                leadership = Leadership(self._ledger, self.address)
                self._election = LeaderElection(leadership, self._lead, self._follow_leader, self.log)
                self.health_monitor.election = self._election
                await self._follow_leader()
                await self._election.start()
            else:
                await self._lead()
        except BaseException:
            await self._close()
            raise
        self._health_task = asyncio.create_task(self.health_monitor.run())

    async def _lead(self) -> None:
        """Adopt the ledger's live leases, and grant from now on. Raises PoolError."""
        self._manager = manager = await self._call(self._new_manager)
        await self.engine.start(self._workers.ended, self._servers_changed)
        if isinstance(self.engine, ReplacingEngine):
            self.engine.on_replaced(self._workers.replaced)
        servers = await self.engine.servers()
        live = await self._call(manager.leases)
        self._listeners.remember(live)
        adopted = await self.engine.adopt([lease for lease in live if lease.state.has_worker])
        await (
            self._settled()
        )  # record how workers ended while no pool ran, before recover() declares leases lost
        await self._change(manager.set_servers, servers)
        await self._change(manager.recover, adopted, self.reclaiming.parked(), self.moving.arrived())
        self._ticker = asyncio.create_task(self._tick())
        self._servers_changed(await self.engine.servers())  # they may have changed meanwhile
        self._waiters.wake_all()  # they waited for changes that the former leader made

    async def _follow_leader(self) -> None:
        """Answer read-only calls: another daemon on this ledger leads and manages the workers."""
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
            await self.engine.stop()
        try:
            servers = await self.engine.servers()
            self._has_servers = bool(servers)
            await self._call(self._require_manager().follow, servers)
        except PoolError as e:
            self.log.error("The pool's GPU servers cannot be listed yet: %s", e)
        self._waiters.wake_all()

    async def stop(self) -> None:
        """Stop granting. Release all leases, unless the engine's workers outlive the pool."""
        if self._stopping:
            return
        self._stopping = True
        for task in (self._ticker, self._health_task):
            if task is not None:
                task.cancel()
        leads = self._election is None or self._election.leading
        if self._manager is not None and leads and not self.engine.persistent:
            for lease in await self._call(self._manager.leases):
                try:
                    await self._run(self._manager.release, lease.id, None, "the pool was shut down")
                except PoolError as e:
                    self.log.warning("Lease %s could not be released: %s", lease.id, e)
        await self._settled()
        await self._close()
        self._waiters.wake_all()

    async def _settled(self) -> None:
        """Wait until the actions of earlier changes are done, for at most 30 s."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=30)

    def _open(self) -> Manager:
        self._ledger = self.thread.ledger = Ledger(self.db_url)
        self._history = History(self._ledger)
        return self._new_manager()

    def _new_manager(self) -> Manager:
        assert self._ledger is not None
        # An engine of another package may know nothing of lost connections.
        resume_s = float(getattr(self.engine, "resume_s", 0.0))
        audit_s = self.audit_retention_days * 86400.0
        policy = POLICIES[self.placement_policy]
        reclaim = ReclaimPolicy(
            Reclaim(self.reclaim), self.reclaim_after_s, self.min_resident_s, self.oversubscribe
        )
        return Manager(
            self._ledger,
            ttl_s=self.ttl_s,
            resume_s=resume_s,
            audit_s=audit_s,
            policy=policy,
            reclaim=reclaim,
            can_move=self._can_move if self.move_for_others and self.moving.is_possible else None,
            moves_within_server=False,
            may_move=self.moving.is_possible,
            queue_limits=QueueLimits(self.queued_per_user, self.queued_per_namespace),
        )

    @staticmethod
    def _can_move(lease: Lease) -> bool:
        return not immovable(lease.slices)

    async def _close(self) -> None:
        await self.engine.stop()
        if self._election is not None:
            await self._election.stop()
        if self._ledger is not None:
            await self._call(self._ledger.close)
        self.thread.stop()
        if self._lock is not None:
            self._lock.release()

    # -- what clients ask for

    def scope(self, owner: str) -> str | None:
        """Return whose leases ``owner`` sees: a name, or None for everybody's."""
        return owner

    def named(self, owner: str) -> str:
        """Return the name under which ``owner`` holds leases."""
        return owner

    async def request(self, request: Request, wait_s: float = 0.0) -> Lease:
        """Grant, queue or refuse a request.

        With ``wait_s``, return when its worker runs, or after that many seconds.
        """
        if self._refuses_requests:
            raise PoolUnreachable("this pool is ending, because nobody used it; make the request again")
        lease = await self._run(
            self._leading_manager().request, request, new_id=request.id if is_id(request.id) else ""
        )
        if wait_s <= 0:
            return lease
        return await self.wait(lease.id, request.owner, wait_s, until_settled=True)

    async def forecast(self, request: Request) -> dict[str, Any]:
        """Return the outcome of a request if it were made now (see docs/reference/http.md)."""
        try:
            lease = await self._call(self._informed_manager().forecast, request)
        except ImpossibleRequest as e:
            return {"outcome": "impossible", "position": None, "reason": str(e), "slices": []}
        return forecast_json(lease)

    async def wait(
        self,
        lease_id: str,
        owner: str | None,
        wait_s: float,
        state: str | None = None,
        position: int | None = None,
        until_settled: bool = False,
    ) -> Lease:
        """Return the lease as soon as it differs from ``state`` and ``position``, or after ``wait_s`` seconds.

        ``until_settled``: return as soon as it is neither queued nor waiting for its worker.
        """
        deadline = time.monotonic() + min(wait_s, 60.0)
        with self._waiters.of(lease_id) as changed:
            while True:
                changed.clear()
                lease = await self.thread.together(self._require_manager().lease, lease_id, owner)
                if until_settled:
                    done = lease.state not in (LeaseState.QUEUED, LeaseState.GRANTED)
                else:
                    done = lease.state.value != state or (position is not None and lease.position != position)
                left = deadline - time.monotonic()
                if done or left <= 0 or self._stopping:
                    return lease
                try:
                    is_notified = self._election is None or self._election.leading
                    await asyncio.wait_for(changed.wait(), min(left, self.ttl_s / 3 if is_notified else 0.3))
                except (TimeoutError, asyncio.TimeoutError):
                    if until_settled and not lease.state.ended:
                        # A client that waits for the answer to its request is alive, and sends no heartbeats yet.
                        await self._call(self._require_manager().heartbeat, lease_id, owner)

    async def heartbeat(self, lease_id: str, owner: str | None) -> Lease:
        """Keep a lease alive."""
        return _lease(await self.thread.together(self._leading_manager().heartbeat, lease_id, owner))

    async def release(self, lease_id: str, owner: str | None, reason: str = "released") -> Lease:
        """End a lease. When this returns, its worker has stopped."""
        lease = await self._run(self._leading_manager().release, lease_id, owner, reason)
        await self.engine.stop_worker(lease_id)
        return lease

    async def resize(
        self, lease_id: str, owner: str | None, partial: float | None, memory_mib: int | None
    ) -> Lease:
        """Change how much of its GPUs a lease holds. When this returns, its worker keeps to the new limit.

        If this fails, the lease stays as it was.
        """
        return await self._resizing.resize(
            self._leading_manager(), self.engine, lease_id, owner, partial, memory_mib
        )

    async def drain(self, server: str, draining: bool = True, move: bool = False) -> dict[str, Any]:
        """Place no new leases on a server, or place them again. Survives restarts.

        Its present leases stay, unless they are to ``move``: then that begins. Returns how far that is.
        """
        manager = self._leading_manager()
        if move:
            self.moving.check()
        await self._servers.drain(manager, server, draining)
        drain = await self.moving.leave(manager, server) if move else self.moving.progress(server)
        return {"name": server, "draining": draining, **drain.to_json()}

    async def drained(self, name: str) -> dict[str, Any]:
        """Return whether a server is drained, and how far the moves of its leases are. Raises UnknownServer."""
        servers, _ = await self._call(self._require_manager().granted)
        draining = next((server.draining for server in servers if server.name == name), None)
        if draining is None:
            raise UnknownServer(f"the pool has no GPU server {name[:60]!r}; see gpupool gpus")
        return {"name": name, "draining": draining, **self.moving.progress(name).to_json()}

    async def leases(self, owner: str | None, include_ended: bool = False) -> list[Lease]:
        """Return the leases that ``owner`` (None: an administrator) sees."""
        return await self._call(
            self._require_manager().leases, include_ended, owner, 500 if include_ended else None
        )

    async def pool(self, owner: str | None) -> dict[str, Any]:
        """Return the pool as JSON, as ``owner`` (None: an administrator) may see it; see :func:`.pool_snapshot`."""
        return (await self.look(owner))[0]

    async def look(self, owner: str | None = None) -> tuple[dict[str, Any], list[Lease], Namespaces]:
        """Return the pool as :meth:`pool` does, its live leases, and the namespaces that decide who sees them."""
        names = self._informed_manager().namespaces
        now = await self._call(self._require_manager().snapshot)
        return (
            pool_snapshot(now, self.engine.usage(), owner, names, self.health_monitor.ok),
            [*now.leases, *now.parked, *now.queue],
            names,
        )

    async def history(
        self, since: float | None, step: int | None = None, gpus: Sequence[str] | None = ()
    ) -> dict[str, Any]:
        """Return utilization since a time (default: the last hour), as :meth:`History.series` does."""
        self._require_manager()
        assert self._history is not None
        now = time.time()
        return await self._call(self._history.series, now, now - 3600 if since is None else since, step, gpus)

    async def health(self) -> tuple[float, tuple[Check, ...]]:
        """Return when the pool was last checked, in seconds since the epoch, and each check's result."""
        self._require_manager()
        return await self.health_monitor.checks()

    async def namespaces(self) -> Namespaces:
        """Return the namespaces as they are now.

        The leader has them in memory, where each change replaces them as a whole.
        """
        manager = self._require_manager()
        if self._election is None or self._election.leading:
            return manager.namespaces
        return await self._call(manager.known)

    async def with_ledger(self, function: Callable[[Ledger], T]) -> T:
        """Run ``function(ledger)`` on the manager's thread, for tables other than the leases'."""
        self._require_manager()
        assert self._ledger is not None
        return await self._call(function, self._ledger)

    async def with_manager(self, function: Callable[[Manager], T]) -> T:
        """Run ``function(manager)`` on the manager's thread, to read."""
        return await self._call(function, self._require_manager())

    async def carry_out(self, function: Callable[[Manager], Change]) -> Any:
        """Make a change with ``function(manager)`` and carry out its actions. Returns the changed lease, if any."""
        return (await self._change(function, self._leading_manager())).lease

    async def idle(self) -> bool:
        """Return whether no lease is held or queued."""
        return not await self._call(self._require_manager().leases)

    def refuse_requests(self) -> None:
        """Refuse requests from now on: the pool ends as soon as it has no lease."""
        self._refuses_requests = True

    def listen(self, callback: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Call ``callback`` in the event loop for each change of a lease's state. Returns a function that ends this."""
        return self._listeners.add(callback)

    def on_resumed(self, callback: Callable[[float], None]) -> None:
        """Call ``callback`` with the seconds from each parked program's need of its GPUs until it had them again."""
        self._workers.on_resumed = callback

    def on_moved(self, callback: Callable[[float | None], None]) -> None:
        """Call ``callback`` with the seconds that each move of a lease took, or None for one that stayed."""
        self.moving.on_moved = callback

    # -- how it works

    def _require_manager(self) -> Manager:
        if self._manager is None:
            raise PoolError("the pool is not running")
        return self._manager

    def _leading_manager(self) -> Manager:
        """Return the manager for a change, which only the leader may make. Raises NotLeading."""
        if self._election is not None:
            self._election.check()
        return self._require_manager()

    def _informed_manager(self) -> Manager:
        """Return the manager for a question about the servers. Raises NotLeading if only the leader knows them."""
        return self._require_manager() if self._has_servers else self._leading_manager()

    async def _call(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function on the manager's thread, one call at a time."""
        return await self.thread.call(function, *args)

    async def _change(self, function: Callable[..., Change], *args: Any) -> Change:
        """Make a change in a transaction of its own, and carry out its actions in the background."""
        change = await self._call(function, *args)
        self._follow(change)
        return change

    async def _together(self, function: Callable[..., Change], *args: Any, new_id: str = "") -> Change:
        """Make a change that may share a transaction with others, and carry out its actions in the background."""
        change = await self.thread.together(function, *args, new_id=new_id)
        self._follow(change)
        return change

    async def _run(self, function: Callable[..., Change], *args: Any, new_id: str = "") -> Lease:
        return _lease(await self._together(function, *args, new_id=new_id))

    def _follow(self, change: Change) -> None:
        """Carry out a change's actions, and notify listeners and waiting calls."""
        self._workers.carry_out(change)
        for lease in change.changed:
            self._listeners.notify(lease)
        self._waiters.notify(change)
        if any(lease.state is LeaseState.QUEUED or lease.is_woken for lease in change.changed):
            self._make_room()

    def _make_room(self) -> None:
        self.reclaiming.look()
        if self.move_for_others:
            self.moving.make_room()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run it in the background; :meth:`stop` waits for it."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _servers_changed(self, servers: Sequence[Server]) -> None:
        if self._manager is None or self._ticker is None:
            return  # start() is about to ask for them
        self.health_monitor.servers = tuple(servers)
        self._servers.update(self._manager, self.health_monitor.marked(servers))

    async def _sample(self) -> None:
        """Record a sample for the chart of utilization, if one is due."""
        assert self._history is not None
        now = time.time()
        if self._history.due(now):
            servers, granted_mib = await self._call(self._require_manager().granted)
            await self._call(self._history.record, now, uses(servers, granted_mib, self.engine.usage()))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_INTERVAL_S)
            try:
                usage = self.engine.usage()
                self.on_usage(usage)
                computing = [id for id, of_lease in usage.items() if any(of_lease.busy.values())]
                await self._call(self._require_manager().computing, computing)
                await self._change(self._require_manager().tick)
                self._make_room()
                await self._sample()
                traces.current.look(self.engine.usage)
            except PoolError as e:
                self.log.error("The pool cannot check its leases, and tries again: %s", e)


def _lease(change: Change) -> Lease:
    assert change.lease is not None
    return change.lease

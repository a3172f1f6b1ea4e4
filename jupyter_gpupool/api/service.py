"""One running pool: a manager on a thread of its own, an engine, and those who wait for either."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jupyter_core.paths import jupyter_data_dir
from traitlets import Any as AnyTrait
from traitlets import Enum, Float, Unicode, default
from traitlets.config import LoggingConfigurable

from ..pool.errors import EngineFailure, ImpossibleRequest, NotLeading, PoolError
from ..pool.history import History
from ..pool.interfaces import Engine
from ..pool.leadership import Leadership
from ..pool.ledger import Ledger
from ..pool.lock import LedgerLock, ledger_file
from ..pool.manager import Manager
from ..pool.models import Change, Lease, LeaseState, Request, Server, StartWorker, StopWorker
from ..pool.namespaces import Namespaces
from ..pool.validation import is_id
from . import traces
from .engines import ENGINES, engine_class
from .health import Check, Health
from .leading import Contender
from .listeners import Listeners
from .picture import foreseen, picture, uses
from .resizing import Resizing
from .tenants import Tenants
from .thread import ManagerThread
from .waiters import Waiters

__all__ = ["Check", "PoolService"]

T = TypeVar("T")

#: How often the pool looks for leases whose time is over, in seconds.
_TICK_S = 0.5


class PoolService(LoggingConfigurable):
    """A pool of the GPUs that its engine has, for as long as it runs.

    All methods but :meth:`start` and :meth:`stop` raise :mod:`jupyter_gpupool.pool.errors`.
    """

    db_url = Unicode(
        help="Database URL of the ledger. Default: an SQLite file in Jupyter's data directory."
    ).tag(config=True)
    ttl_s = Float(15.0, min=1.0, help="Seconds that a lease outlives its holder's last heartbeat.").tag(
        config=True
    )
    audit_days = Float(90.0, min=0.0, help="Days for which it is kept who asked for what.").tag(config=True)
    engine_name = Enum(
        list(ENGINES),
        help="Where workers run: on this machine, or (`ray`) on a Ray cluster. Default: GPUPool.engine, else `local`.",
    ).tag(config=True)
    engine: Any = AnyTrait(help="A jupyter_gpupool.pool.interfaces.Engine.")

    @default("engine_name")
    def _default_engine_name(self) -> str:
        return self.config.get("GPUPool", {}).get("engine") or "local"

    @default("db_url")
    def _default_db_url(self) -> str:
        return f"sqlite:///{Path(jupyter_data_dir()) / 'gpupool' / 'ledger.sqlite'}"

    @default("engine")
    def _default_engine(self) -> Engine:
        file = ledger_file(self.db_url)
        return engine_class(self.engine_name)(parent=self, pool_id=str(file or self.db_url))

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.thread = ManagerThread()
        self._lock: LedgerLock | None = None
        self._ledger: Ledger | None = None
        self._manager: Manager | None = None
        self._history: History | None = None
        self._waiters = Waiters()
        self._tasks: set[asyncio.Task] = set()
        self._ticker: asyncio.Task | None = None
        self._nurse: asyncio.Task | None = None
        self._contender: Contender | None = None  # for the lead, where several daemons share the ledger
        self.address = ""  # where this pool answers
        self._stopping = False
        self._resizing = Resizing(self._call, self._run)
        self._listeners = Listeners(self.log)
        self._servers: tuple[Server, ...] | None = None  # not in the manager yet
        self.wellness = Health(
            self.engine, self.with_ledger, lambda: self._servers_changed(self.wellness.servers)
        )
        self.tenants = Tenants(self)

    # -- life

    async def start(self) -> None:
        """Open the ledger, take up what it holds, and get ready to grant. Raises PoolError."""
        file = ledger_file(self.db_url)
        if file is not None:
            self._lock = LedgerLock(file)
            self._lock.acquire()
        try:
            self._manager = await self._call(self._open)
            if self._ledger is not None and self._ledger.shared:
                leadership = Leadership(self._ledger, self.address)
                self._contender = Contender(leadership, self._lead, self._follow_another, self.log)
                self.wellness.contender = self._contender
                await self._follow_another()
                await self._contender.start()
            else:
                await self._lead()
        except BaseException:
            await self._close()
            raise
        self._nurse = asyncio.create_task(self.wellness.run())

    async def _lead(self) -> None:
        """Take up what the ledger holds, and grant from now on. Raises PoolError."""
        self._manager = manager = await self._call(self._new_manager)
        await self.engine.start(self._worker_ended, self._servers_changed)
        servers = await self.engine.servers()
        live = await self._call(manager.leases)
        self._listeners.know(live)
        adopted = await self.engine.adopt([lease for lease in live if lease.state.holds])
        await self._settled()  # how workers ended while no pool ran is to be known before who is lost
        self._follow(await self._call(manager.set_servers, servers))
        self._follow(await self._call(manager.recover, adopted))
        self._ticker = asyncio.create_task(self._tick())
        self._servers_changed(await self.engine.servers())  # one may have come or gone meanwhile
        self._waiters.wake_all()  # they asked the one that led before

    async def _follow_another(self) -> None:
        """Answer questions only: another daemon on this ledger leads, and looks after the workers."""
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
            await self.engine.stop()
        try:
            await self._call(self._need().follow, await self.engine.servers())
        except PoolError as e:
            self.log.error("The pool's servers cannot be told yet: %s", e)
        self._waiters.wake_all()

    async def stop(self) -> None:
        """Stop granting. An embedded pool's leases end with it; a persistent one's go on computing."""
        if self._stopping:
            return
        self._stopping = True
        for task in (self._ticker, self._nurse):
            if task is not None:
                task.cancel()
        leads = self._contender is None or self._contender.leading
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
        """What follows from earlier changes is done, or takes too long."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=30)

    def _open(self) -> Manager:
        self._ledger = self.thread.ledger = Ledger(self.db_url)
        self._history = History(self._ledger)
        return self._new_manager()

    def _new_manager(self) -> Manager:
        assert self._ledger is not None
        return Manager(self._ledger, ttl_s=self.ttl_s, audit_s=self.audit_days * 86400.0)

    async def _close(self) -> None:
        await self.engine.stop()
        if self._contender is not None:
            await self._contender.stop()
        if self._ledger is not None:
            await self._call(self._ledger.close)
        self.thread.stop()
        if self._lock is not None:
            self._lock.release()

    # -- what clients ask for

    def scope(self, owner: str) -> str | None:
        """Whose leases ``owner`` sees: None for everybody's."""
        return owner

    def named(self, owner: str) -> str:
        """The name whose leases ``owner``'s are."""
        return owner

    async def request(self, request: Request, wait_s: float = 0.0) -> Lease:
        """Grant, queue or refuse; with ``wait_s`` answer when its worker is up, or that much later."""
        lease = await self._run(self._to_change().request, request, new_id=request.id if is_id(request.id) else "")
        if wait_s <= 0:
            return lease
        return await self.wait(lease.id, request.owner, wait_s, until_settled=True)

    async def forecast(self, request: Request) -> dict[str, Any]:
        """What a request would come to if it were made now (see docs/architecture.md)."""
        try:
            lease = await self._call(self._need().forecast, request)
        except ImpossibleRequest as e:
            return {"outcome": "impossible", "position": None, "reason": str(e), "slices": []}
        return foreseen(lease)

    async def wait(
        self,
        lease_id: str,
        owner: str | None,
        wait_s: float,
        state: str | None = None,
        position: int | None = None,
        until_settled: bool = False,
    ) -> Lease:
        """The lease, as soon as it differs from ``state`` and ``position``, or ``wait_s`` seconds later.

        ``until_settled``: as soon as it is neither queued nor waiting for its worker.
        """
        deadline = time.monotonic() + min(wait_s, 60.0)
        with self._waiters.of(lease_id) as changed:
            while True:
                changed.clear()
                lease = await self.thread.together(self._need().lease, lease_id, owner)
                if until_settled:
                    done = lease.state not in (LeaseState.QUEUED, LeaseState.GRANTED)
                else:
                    done = lease.state.value != state or (position is not None and lease.position != position)
                left = deadline - time.monotonic()
                if done or left <= 0 or self._stopping:
                    return lease
                try:
                    told = self._contender is None or self._contender.leading
                    await asyncio.wait_for(changed.wait(), min(left, self.ttl_s / 3 if told else 0.3))
                except (TimeoutError, asyncio.TimeoutError):
                    if until_settled and not lease.state.ended:
                        # Who waits for the answer to a request is alive, and has no lease to keep yet.
                        await self._call(self._need().heartbeat, lease_id, owner)

    async def heartbeat(self, lease_id: str, owner: str | None) -> Lease:
        return _lease(await self.thread.together(self._to_change().heartbeat, lease_id, owner))

    async def release(self, lease_id: str, owner: str | None, reason: str = "released") -> Lease:
        """End a lease; when this returns its worker is gone."""
        lease = await self._run(self._to_change().release, lease_id, owner, reason)
        await self.engine.stop_worker(lease_id)
        return lease

    async def resize(
        self, lease_id: str, owner: str | None, partial: float | None, memory_mib: int | None
    ) -> Lease:
        """Another share of the same GPUs; when this returns the worker keeps to it. Nothing is lost if it fails."""
        return await self._resizing.resize(
            self._to_change(), self.engine, lease_id, owner, partial, memory_mib
        )

    async def drain(self, server: str, draining: bool = True) -> None:
        """Place nothing new on that server (what is there stays), or place on it again. Outlives restarts."""
        self._follow(await self._call(self._to_change().drain, server, draining))

    async def leases(self, owner: str | None, include_ended: bool = False) -> list[Lease]:
        return await self._call(self._need().leases, include_ended, owner, 500 if include_ended else None)

    async def pool(self, owner: str | None) -> dict[str, Any]:
        """The pool as JSON to ``owner``, or (None) to who administers it; see :mod:`.picture`."""
        return (await self.look(owner))[0]

    async def look(self, owner: str | None = None) -> tuple[dict[str, Any], list[Lease], Namespaces]:
        """The same, and all leases that live, and what says who sees what of them."""
        names = self._need().namespaces
        now = await self._call(self._need().snapshot)
        return picture(now, self.engine.usage(), owner, names, self.wellness.ok), [*now.leases, *now.queue], names

    async def history(
        self, since: float | None, step: int | None = None, gpus: Sequence[str] | None = ()
    ) -> dict[str, Any]:
        """Utilisation since then (default: for an hour), as :meth:`History.series` has it."""
        self._need()
        assert self._history is not None
        now = time.time()
        return await self._call(self._history.series, now, now - 3600 if since is None else since, step, gpus)

    async def health(self) -> tuple[float, tuple[Check, ...]]:
        """When (seconds since the epoch) the pool was last looked at, and each check by name."""
        self._need()
        return await self.wellness.checks()

    async def namespaces(self) -> Namespaces:
        """As they are now. Who leads has them in memory, where each change replaces them as a whole."""
        manager = self._need()
        if self._contender is None or self._contender.leading:
            return manager.namespaces
        return await self._call(manager.known)

    async def with_ledger(self, function: Callable[..., T], *args: Any) -> T:
        """``function(ledger, *args)`` on the manager's thread: for tables that are not about leases."""
        self._need()
        return await self._call(function, self._ledger, *args)

    async def with_manager(self, function: Callable[[Manager], T]) -> T:
        """``function(manager)`` on its thread: for what it remembers."""
        return await self._call(function, self._need())

    async def carry_out(self, function: Callable[[Manager], Change]) -> Any:
        """The same of what changes something: the lease that it is about, if it is about one."""
        change = await self._call(function, self._to_change())
        self._follow(change)
        return change.lease

    async def idle(self) -> bool:
        """Whether nobody holds or waits for anything."""
        return not await self._call(self._need().leases)

    def listen(self, callback: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Have every lease's change of state told, in the event loop's thread, until the answer is called."""
        return self._listeners.add(callback)

    # -- how it works

    def _need(self) -> Manager:
        if self._manager is None:
            raise PoolError("the pool is not running")
        return self._manager

    def _to_change(self) -> Manager:
        """For what only the daemon that leads may do. Raises NotLeading."""
        if self._contender is not None:
            self._contender.check()
        return self._need()

    async def _call(self, function: Callable[..., T], *args: Any) -> T:
        """Run on the manager's thread; one call at a time."""
        return await self.thread.call(function, *args)

    async def _run(self, function: Callable[..., Change], *args: Any, new_id: str = "") -> Lease:
        change = await self.thread.together(function, *args, new_id=new_id)
        self._follow(change)
        return _lease(change)

    def _follow(self, change: Change) -> None:
        """Carry out a change's actions in their order, and wake who waits."""
        if change.actions:
            task = asyncio.create_task(self._act(change))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        for lease in change.changed:
            self._listeners.tell(lease)
        self._waiters.tell(change)

    async def _act(self, change: Change) -> None:
        for action in change.actions:
            if isinstance(action, StopWorker):
                await self.engine.stop_worker(action.lease_id)
        starts = [action.lease for action in change.actions if isinstance(action, StartWorker)]
        if len(starts) == 1:  # nearly always, and a task less for each grant
            await self._start_worker(starts[0])
        else:
            await asyncio.gather(*map(self._start_worker, starts))

    async def _start_worker(self, lease: Lease) -> None:
        manager = self._need()
        try:
            with traces.current.starting(lease):
                worker = await self.engine.start_worker(lease)
        except EngineFailure as e:
            await self._run(manager.worker_failed, lease.id, str(e))
            return
        try:
            await self._run(manager.worker_started, lease.id, worker)
        except PoolError as e:
            # What is not in the ledger must not compute.
            self.log.error("Lease %s: %s", lease.id, e)
            await self.engine.stop_worker(lease.id)

    def _worker_ended(self, lease_id: str, state: LeaseState, reason: str) -> None:
        if self._manager is None:
            return
        task = asyncio.create_task(self._record_end(self._manager, lease_id, state, reason))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _servers_changed(self, servers: Sequence[Server]) -> None:
        if self._manager is None or self._ticker is None:
            return  # start() is about to ask for them
        self.wellness.servers = tuple(servers)
        self._servers, known = self.wellness.marked(servers), self._servers
        if known is None:  # else whoever is at it takes these too
            task = asyncio.create_task(self._record_servers(self._manager))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _record_servers(self, manager: Manager) -> None:
        while (servers := self._servers) is not None:
            try:
                self._follow(await self._call(manager.set_servers, servers))
            except NotLeading:
                self._servers = None
                return
            except PoolError as e:
                self.log.error("The pool's servers cannot be recorded yet: %s", e)
                await asyncio.sleep(1.0)
                continue
            if servers is self._servers:
                self._servers = None

    async def _record_end(self, manager: Manager, lease_id: str, state: LeaseState, reason: str) -> None:
        while True:
            try:
                self._follow(await self.thread.together(manager.worker_exited, lease_id, state, reason))
                return
            except NotLeading:
                return  # the one that leads sees it, too
            except PoolError as e:
                self.log.error("The end of lease %s cannot be recorded yet: %s", lease_id, e)
                await asyncio.sleep(1.0)

    async def _sample(self) -> None:
        """Keep what the chart is drawn from, when its time has come."""
        assert self._history is not None
        now = time.time()
        if self._history.due(now):
            servers, granted_mib = await self._call(self._need().granted)
            await self._call(self._history.record, now, uses(servers, granted_mib, self.engine.usage()))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                computing = [id for id, usage in self.engine.usage().items() if any(usage.busy.values())]
                await self._call(self._need().computing, computing)
                self._follow(await self._call(self._need().tick))
                await self._sample()
                traces.current.look(self.engine.usage)
            except PoolError as e:
                self.log.error("The pool cannot look after its leases: %s", e)


def _lease(change: Change) -> Lease:
    assert change.lease is not None
    return change.lease

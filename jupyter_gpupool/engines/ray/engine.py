"""Workers on all GPU servers of a Ray cluster.

Ray lists the nodes and allocates their GPUs. An agent on each node forks the workers. Clients connect to the workers
directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from traitlets import Float, Unicode
from traitlets.config import LoggingConfigurable

from jupyter_gpupool.core.engine import ServersChanged, WorkerExit, WorkerReplaced, WorkerState
from jupyter_gpupool.core.errors import EngineError, SliceInUse
from jupyter_gpupool.core.models import Lease, LeaseState, Server, Slice, WorkerAddress, WorkerUsage
from jupyter_gpupool.core.readings import ServerReading
from jupyter_gpupool.engines.worker_options import (
    EmulatedGPUs,
    WorkerBounds,
    WorkerEnvironments,
    WorkerParking,
    WorkerPort,
    WorkerSandbox,
)
from jupyter_gpupool.former_names import FormerNames

from . import together
from .cluster import Cluster, RayNode
from .meeting import Meeting
from .node import Node

#: How often Ray's nodes are listed, in seconds.
_NODES_INTERVAL_S = 1.0
#: How long a starting pool waits for the agents of the present nodes, in seconds.
_AGENTS_TIMEOUT_S = 60.0


class RayEngine(
    EmulatedGPUs,
    WorkerPort,
    WorkerParking,
    WorkerSandbox,
    WorkerBounds,
    WorkerEnvironments,
    FormerNames,
    LoggingConfigurable,
):
    """The engine of a pool whose GPU servers are the nodes of a Ray cluster.

    Offers as many emulated GPUs on a node as Ray counts there.
    """

    former_traits = {"silence_s": "node_timeout_s"}

    address = Unicode(
        "auto", help="The cluster's address (`host:port` of its head), or `auto`: the one on this machine."
    ).tag(config=True)
    attach_timeout_s = Float(10.0, min=0.1, help="Seconds a worker waits for its lease's holder.").tag(
        config=True
    )
    node_timeout_s = Float(
        8.0, min=1.0, help="Seconds without an answer from a GPU server after which its leases are lost."
    ).tag(config=True)
    pool_id = Unicode(
        help="Distinguishes the workers of this pool from those of another pool in the cluster."
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._nodes: dict[str, Node] = {}
        self._parts: dict[str, dict[str, Node]] = {}  # lease → by server's name
        self._moving: dict[str, Node] = {}  # lease → the server that it moves to
        self._arrived: set[str] = set()
        self._wake: Callable[[str], None] = lambda lease_id: None
        self._limits: dict[str, dict[str, int]] = {}  # lease → MiB by GPU uuid, as its workers keep to
        self._watcher: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._adopted = False
        self._trouble = ""
        self._on_exit: WorkerExit = lambda lease_id, state, reason: None
        self._on_servers: ServersChanged = lambda servers: None
        self._on_replaced: WorkerReplaced = lambda lease_id, worker, reason: None

    # -- Engine

    async def start(self, on_exit: WorkerExit, on_servers: ServersChanged = lambda servers: None) -> None:
        """Join the cluster. Raises EngineError if it cannot be joined."""
        self._on_exit, self._on_servers = on_exit, on_servers
        self._cluster = Cluster(self.address, self._pool, self.persistent)
        await self._cluster.connect()
        await self._look()
        waiting = [asyncio.ensure_future(node.looked.wait()) for node in self._nodes.values()]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=_AGENTS_TIMEOUT_S)
            for task in late:
                task.cancel()
        self._watcher = asyncio.create_task(self._watch())

    async def servers(self) -> Sequence[Server]:
        there = [node.server() for node in self._nodes.values() if node.there]
        return sorted(there, key=lambda server: server.name)

    async def start_worker(self, lease: Lease) -> WorkerAddress:
        slices: dict[str, list[Slice]] = {}
        for piece in lease.slices:
            slices.setdefault(piece.server, []).append(piece)
        parts = {name: self._node(name) for name in slices}
        self._parts[lease.id] = parts
        self._limits[lease.id] = {piece.gpu_uuid: piece.memory_mib for piece in lease.slices}
        meeting = Meeting(len(parts))
        try:
            starts = (meeting.attended(node, lease, tuple(slices[name])) for name, node in parts.items())
            workers = await asyncio.gather(*starts, return_exceptions=True)
            if meeting.failure is not None:
                raise meeting.failure
            addresses = dict(zip(parts, cast(list[WorkerAddress], workers)))
            await self._introduce(lease.id, {slices[name][0].gpu_uuid: name for name in parts}, addresses)
        except BaseException:
            await self.stop_worker(lease.id)
            raise
        return _joined(addresses)

    async def _introduce(
        self, lease_id: str, servers: Mapping[str, str], workers: Mapping[str, WorkerAddress]
    ) -> None:
        """Let the workers of a lease be linked to each other: ``servers`` has each one's server by its name."""
        if len(workers) < 2:
            return
        await asyncio.gather(
            *(
                self._node(own).introduce_if_possible(
                    lease_id, {peer: workers[name] for peer, name in servers.items() if name != own}
                )
                for own in workers
            )
        )

    async def stop_worker(self, lease_id: str) -> None:
        nodes = [*self._parts.pop(lease_id, {}).values()]
        if lease_id in self._moving:
            nodes.append(self._moving[lease_id])
        self._limits.pop(lease_id, None)
        await asyncio.gather(*(node.stop(lease_id) for node in dict.fromkeys(nodes)))

    # -- parking

    def on_wake(self, wake: Callable[[str], None]) -> None:
        """Call ``wake(lease_id)`` in the event loop's thread when a parked lease needs its GPUs."""
        self._wake = wake

    def states(self) -> Mapping[str, WorkerState]:
        """Return what each worker that could be parked now would have to copy, by lease id."""
        found = {}
        for lease_id, parts in self._parts.items():
            states = {name: node.parking.states.get(lease_id) for name, node in parts.items()}
            known = {name: state for name, state in states.items() if state is not None}
            if len(known) < len(parts) or lease_id in self._moving:
                continue
            found[lease_id] = WorkerState(
                sum(state.used_mib for state in known.values()),
                all(state.is_clean for state in known.values()),
                {name: state.used_mib for name, state in known.items()} if len(parts) > 1 else {},
            )
        return found

    def arenas(self) -> Mapping[str, int]:
        """Return the MiB of host memory for parked leases, by the server's name."""
        return {
            node.name: node.parking.arena_mib
            for node in self._nodes.values()
            if node.there and node.parking.arena_mib
        }

    def parked(self) -> Collection[str]:
        """Return the ids of the leases whose state is in host memory, on all of their servers."""
        some: set[str] = set().union(*(node.parking.parked for node in self._nodes.values()))
        return frozenset(lease_id for lease_id in some if not self._unparked(lease_id))

    def _unparked(self, lease_id: str) -> list[Node]:
        """The servers on which a lease is not parked."""
        return [
            node for node in self._parts.get(lease_id, {}).values() if lease_id not in node.parking.parked
        ]

    async def park_worker(self, lease: Lease) -> int:
        """Park a lease's workers, all or none, and give its share back to Ray. Return the MiB that are kept for it.

        Raises EngineError.
        """
        parts = self._known_parts(lease)
        if len(parts) == 1:
            (node,) = parts.values()
            mib = await node.parking.park(lease.id, lease.slices)
        else:
            try:
                mib = await together.park(lease, parts)
            except together.Torn as e:
                self._lose(lease.id, str(e))
                raise
        for node in parts.values():
            await node.claims.give_back(lease.id)
        return mib

    async def resume_worker(self, lease: Lease) -> WorkerAddress:
        """Take a share from Ray, and bring the parked state back, on ``lease.slices``. Raises EngineError."""
        parts, pieces = self._known_parts(lease), together.by_server(lease.slices)
        for name, node in parts.items():
            await node.claim(lease.id, pieces[name])
        await together.resume(lease, parts)
        self._limits[lease.id] = {piece.gpu_uuid: piece.memory_mib for piece in lease.slices}
        return _joined({name: node.workers[lease.id] for name, node in parts.items()})

    def _known_parts(self, lease: Lease) -> dict[str, Node]:
        parts = self._parts.get(lease.id, {})
        if not parts:
            raise EngineError(f"the worker of lease {lease.id} has ended")
        return parts

    def _lose(self, lease_id: str, why: str) -> None:
        """End what is left of a lease that cannot go on."""
        for node in self._parts.pop(lease_id, {}).values():
            self._begin(node.stop(lease_id))
        self._limits.pop(lease_id, None)
        self._on_exit(lease_id, LeaseState.LOST, why)

    # -- moving

    async def move_worker(self, lease: Lease) -> WorkerAddress:
        """Move the worker of one server to ``lease.moving_to``; those of others stay.

        Until its server leaves the lease, no client knows of the new one.
        """
        parts, there = self._known_parts(lease), replace(lease, slices=lease.moving_to)
        left, reached = lease.leaving[0].server, lease.arriving[0].server
        source, target = parts[left], self._node(reached)
        others = [node for node in parts.values() if node is not source]
        self._moving[lease.id] = target
        try:
            worker = await target.start(
                there, tuple(together.by_server(there.slices)[reached]), receives=True
            )
            try:
                if others:
                    await together.move(there, source, target, others)
                else:
                    await source.send(lease.id, worker)
                    await target.serve(lease.id)
                if self._parts.get(lease.id) is not parts:
                    raise EngineError("the lease has ended meanwhile")
                if others and lease.id not in target.workers:
                    raise together.Torn(f"its worker on {target.name} ended as it arrived")
            except BaseException as e:
                if isinstance(e, together.Torn) and self._parts.get(lease.id) is parts:
                    self._lose(lease.id, str(e))
                await target.stop(lease.id)
                with contextlib.suppress(EngineError):
                    await source.stay(lease.id)
                raise
            self._parts[lease.id] = {
                (reached if name == left else name): (target if name == left else node)
                for name, node in parts.items()
            }
            self._limits[lease.id] = {piece.gpu_uuid: piece.memory_mib for piece in there.slices}
        finally:
            self._moving.pop(lease.id, None)
        await source.depart(lease.id, worker)
        return _joined({name: node.workers[lease.id] for name, node in self._known_parts(lease).items()})

    def arrived(self) -> Collection[str]:
        """Return the leases that :meth:`adopt` has found where they were to be moved."""
        return frozenset(self._arrived)

    async def limit_worker(self, lease_id: str, limits: Mapping[str, int]) -> None:
        parts = self._parts.get(lease_id)
        if not parts:
            raise EngineError(f"lease {lease_id} has no worker, so its slices cannot be resized")
        before = self._limits.get(lease_id, {})
        limited: list[Node] = []
        try:
            for node in parts.values():
                await node.limit(lease_id, limits)
                limited.append(node)
        except (EngineError, SliceInUse):
            for node in limited:  # all of them, or none
                with contextlib.suppress(EngineError, SliceInUse):
                    await node.limit(lease_id, before)
            raise
        self._limits[lease_id] = {**before, **limits}

    async def adopt(self, leases: Sequence[Lease]) -> dict[str, WorkerAddress]:
        """Take over the workers that still run. Call ``on_exit`` for those that ended while no pool ran, and release
        their shares."""
        there = {node.name: node for node in self._nodes.values() if node.there}
        adopted = {}
        for lease in leases:
            names = await self._where(lease, there)
            parts = {name: there[name] for name in names if name in there}
            if len(parts) < len(names) or any(lease.id not in node.workers for node in parts.values()):
                end = next((node.ended[lease.id] for node in parts.values() if lease.id in node.ended), None)
                if end is not None:
                    self._on_exit(lease.id, *end)
                continue
            self._parts[lease.id] = parts
            self._limits[lease.id] = {piece.gpu_uuid: piece.memory_mib for piece in lease.slices}
            for node in parts.values():
                node.adopt(lease.id)
            adopted[lease.id] = _joined({name: node.workers[lease.id] for name, node in parts.items()})
        for lease_id, gpu_uuid, units, group in await self._cluster.claims():
            for node in self._parts.get(lease_id, {}).values():
                index = node.index_of(gpu_uuid)
                if index is not None and (lease_id not in node.parking.parked or self._unparked(lease_id)):
                    node.claims.adopt(lease_id, index, units, group)
                    break
            else:
                await self._cluster.give_back(group)
        for lease in leases:
            await self._settle(lease)
        self._adopted = True
        for node in self._nodes.values():
            if node.there:
                await node.tidy(
                    lease.id for lease in leases if node in self._parts.get(lease.id, {}).values()
                )
            else:
                node.settled()
        return adopted

    async def _settle(self, lease: Lease) -> None:
        """Let the workers of a lease that spans servers go on that an earlier pool has stopped, or parked in part."""
        parts = self._parts.get(lease.id, {})
        if len(parts) < 2:
            return
        if lease.moving_to:
            await together.end_move(lease.id, parts.values(), is_done=lease.id in self._arrived)
            await together.introduce(lease.id, parts.values())
        parked = {name: node for name, node in parts.items() if lease.id in node.parking.parked}
        if len(parked) < len(parts) and not lease.state.holds and lease.id not in self._arrived:
            # What its parts use is others' by now.
            self._lose(
                lease.id, "the pool ended while a part of it moved, and other parts were awake already"
            )
            return
        if len(parked) < len(parts):
            with contextlib.suppress(EngineError):  # it has ended, which is about to be heard
                await together.resume(lease, parked)
        await together.release(lease.id, parts.values())

    def on_replaced(self, replaced: WorkerReplaced) -> None:
        """Call ``replaced`` for each worker that has taken the place of one that ended by what it computed."""
        self._on_replaced = replaced

    async def _where(self, lease: Lease, there: Mapping[str, Node]) -> list[str]:
        """The names of the servers that have a lease after a restart.

        One that was being moved goes on where it was, unless only the other server still has it. Then no client has
        been sent there, or all have.
        """
        here = list(dict.fromkeys(piece.server for piece in lease.slices))
        if not lease.moving_to:
            return here
        left, reached = lease.leaving[0].server, lease.arriving[0].server
        source, target = there.get(left), there.get(reached)
        if source is not None and lease.id in source.workers:
            with contextlib.suppress(EngineError):  # it has left
                await source.stay(lease.id)
                return here
        if target is not None and lease.id in target.workers:
            with contextlib.suppress(EngineError):  # it has not arrived whole
                await target.serve(lease.id)
                self._arrived.add(lease.id)
                return [reached if name == left else name for name in here]
        return here

    def usage(self) -> dict[str, WorkerUsage]:
        found: dict[str, WorkerUsage] = {}
        for node in self._nodes.values():
            for lease_id, usage in node.usage.items():
                known = found.get(lease_id, WorkerUsage())
                found[lease_id] = WorkerUsage(
                    {**known.allocated_bytes, **usage.allocated_bytes},
                    {**known.busy, **usage.busy},
                    max(known.sessions, usage.sessions),
                    usage.held_at or known.held_at,
                    known.reconnects + usage.reconnects,
                    sorted({*known.frameworks, *usage.frameworks}),
                    {**known.overhead_bytes, **usage.overhead_bytes},
                )
        return found

    def readings(self) -> list[ServerReading]:
        return [reading for node in self._nodes.values() for reading in node.readings]

    async def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        await asyncio.gather(*(node.detach(not self.persistent) for node in self._nodes.values()))
        for task in self._tasks:
            task.cancel()
        if hasattr(self, "_cluster"):
            await self._cluster.disconnect()

    @property
    def listens_on(self) -> int:
        return self.data_port

    @property
    def warm(self) -> bool:
        there = [node for node in self._nodes.values() if node.there]
        return bool(there) and all(node.warm for node in there)

    @property
    def failure(self) -> str:
        if self._trouble:
            return self._trouble
        if not any(node.there for node in self._nodes.values()):
            return "no node of the Ray cluster with GPUs can be reached; see `ray status`"
        return next((node.failure for node in self._nodes.values() if node.failure), "")

    # -- how it works

    @property
    def _pool(self) -> str:
        return hashlib.sha256(self.pool_id.encode()).hexdigest()[:12]

    def _node(self, name: str) -> Node:
        for node in self._nodes.values():
            if node.name == name and node.there:
                return node
        raise EngineError(
            f"GPU server {name} does not answer; wait until it is back, or request GPUs of another one"
        )

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_NODES_INTERVAL_S)
            try:
                await self._look()
                self._trouble = ""
            except Exception as e:  # Ray's own errors are of many kinds
                self._trouble = f"the nodes of the Ray cluster cannot be listed: {str(e).splitlines()[0]}"
                self.log.error("%s", self._trouble)

    async def _look(self) -> None:
        alive = {node.id: node for node in await self._cluster.nodes()}
        for node_id in [known for known in self._nodes if known not in alive]:
            gone = self._nodes.pop(node_id)
            self._begin(gone.leave(f"GPU server {gone.name} has left the Ray cluster"))
        for found in alive.values():
            if found.id not in self._nodes:
                self._nodes[found.id] = node = self._new(found)
                if self._adopted:
                    node.settled()
                node.watch()
            self._nodes[found.id].look(found.free)

    def _new(self, found: RayNode) -> Node:
        name = found.name
        if name in {node.name for node in self._nodes.values()}:
            name = f"{name}-{found.id[:8]}"  # several nodes of one machine
        settings = {
            "name": name,
            "gpus": found.gpus,
            "emulate": self.emulate,
            "emulated_name": self.emulated_name,
            "emulated_memory_mib": self.emulated_memory_mib,
            "local": {
                "host": found.address,
                "certfile": self.certfile,
                "data_port": self.data_port,
                "attach_timeout_s": self.attach_timeout_s,
                "resume_s": self.resume_s,
                "window_mib": self.window_mib,
                "park_memory_mib": self.park_memory_mib,
                "clean_after_s": self.clean_after_s,
                "sandbox": self.sandbox,
                "host_memory_mib": self.host_memory_mib,
                "worker_disk_mib": self.worker_disk_mib,
                "environments": dict(self.environments),
                "environment_idle_s": self.environment_idle_s,
                "operators": dict(self.operators),
                "environments_dir": self.environments_dir,
                "pool_id": f"{self._pool}/{found.id}",
            },
        }
        return Node(
            self._cluster,
            found,
            settings,
            node_timeout_s=self.node_timeout_s,
            log=self.log,
            on_change=self._changed,
            on_ended=self._part_ended,
            on_replaced=self._part_replaced,
            on_wanted=lambda lease_id: self._wake(lease_id),
        )

    def _changed(self) -> None:
        there = [node.server() for node in self._nodes.values() if node.there]
        self._on_servers(sorted(there, key=lambda server: server.name))

    def _part_ended(self, node: Node, lease_id: str, state: LeaseState, reason: str) -> None:
        if node is self._moving.get(lease_id):
            return  # the lease goes on where it was
        others = [other for other in self._parts.pop(lease_id, {}).values() if other is not node]
        if lease_id in self._moving:
            self._begin(self._moving[lease_id].stop(lease_id))
        self._limits.pop(lease_id, None)
        for other in others:
            self._begin(other.stop(lease_id))
        if others and state is LeaseState.LOST:
            where = "" if node.name in reason else f" on GPU server {node.name}"
            reason = f"{reason}{where}; what the lease had on {_names(others)} ended with it"
        self._on_exit(lease_id, state, reason)

    def _part_replaced(self, node: Node, lease_id: str, reason: str) -> None:
        parts = self._parts.get(lease_id)
        if parts and all(lease_id in part.workers for part in parts.values()):
            where = f"{reason} (on GPU server {node.name})" if len(parts) > 1 else reason
            joined = _joined({name: part.workers[lease_id] for name, part in parts.items()})
            self._on_replaced(lease_id, joined, where)

    def _begin(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _joined(workers: Mapping[str, WorkerAddress]) -> WorkerAddress:
    """Return a lease's workers by server as one address."""
    (_, first), *others = workers.items()
    return replace(first, elsewhere=dict(others))


def _names(nodes: Sequence[Node]) -> str:
    return ", ".join(node.name for node in nodes)

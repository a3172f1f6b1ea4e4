"""Workers on all GPU servers of a Ray cluster. Ray knows its nodes and shares out their GPUs; an agent on each
node forks the workers; clients talk to the workers directly."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from traitlets import Bool, Enum, Float, Int, Unicode
from traitlets.config import LoggingConfigurable

from ...devices.emulated import DEFAULT_MEMORY_MIB, DEFAULT_NAME
from ...devices.readings import ServerReading
from ...pool.errors import EngineFailure, InUse
from ...pool.interfaces import ServersChanged, WorkerExit
from ...pool.models import Lease, LeaseState, Server, Slice, WorkerAddress, WorkerUsage
from .cluster import Cluster, RayNode
from .node import Node

#: How often Ray is asked for its nodes, in seconds.
_LOOK_S = 1.0
#: How long a pool that starts waits for the agents of the nodes that are there, in seconds.
_START_S = 60.0


class RayEngine(LoggingConfigurable):
    """The engine of a pool whose GPU servers are the nodes of a Ray cluster."""

    address = Unicode(
        "auto", help="The cluster's address (`host:port` of its head), or `auto`: the one on this machine."
    ).tag(config=True)
    certfile = Unicode(
        help="Certificate (PEM) of each GPU server, a file there. With it workers speak TLS 1.3 only, all of a server "
        "behind `data_port`."
    ).tag(config=True)
    keyfile = Unicode(help="The certificate's private key (PEM), a file on each GPU server.").tag(config=True)
    data_port = Int(
        0,
        min=0,
        max=65535,
        help="On each GPU server the one port of all workers with TLS; 0 takes a free one.",
    ).tag(config=True)
    emulate = Enum(
        ["auto", "always", "never"],
        "auto",
        help="Offer as many emulated GPUs as Ray counts on a node: `auto` where NVML finds no GPU there, `always`, or "
        "`never`.",
    ).tag(config=True)
    emulated_name = Unicode(DEFAULT_NAME, help="Name of the emulated GPUs.").tag(config=True)
    emulated_memory_mib = Int(DEFAULT_MEMORY_MIB, min=1, help="Memory of each emulated GPU, in MiB.").tag(
        config=True
    )
    persistent = Bool(False, help="Workers outlive a pool that is killed, and its successor finds them.").tag(
        config=True
    )
    attach_timeout_s = Float(10.0, min=0.1, help="Seconds a worker waits for its lease's holder.").tag(
        config=True
    )
    silence_s = Float(
        8.0, min=1.0, help="Seconds without a word from a GPU server after which its leases are lost."
    ).tag(config=True)
    pool_id = Unicode(help="Tells the workers of this pool from those of another one in the cluster.")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._nodes: dict[str, Node] = {}
        self._parts: dict[str, dict[str, Node]] = {}  # lease → by server's name
        self._limits: dict[str, dict[str, int]] = {}  # lease → MiB by GPU uuid, as its workers keep to
        self._watcher: asyncio.Task | None = None
        self._tasks: set[asyncio.Task] = set()
        self._adopted = False
        self._trouble = ""
        self._on_exit: WorkerExit = lambda lease_id, state, reason: None
        self._on_servers: ServersChanged = lambda servers: None

    # -- Engine

    async def start(self, on_exit: WorkerExit, on_servers: ServersChanged = lambda servers: None) -> None:
        """Raises EngineFailure where there is no such cluster."""
        self._on_exit, self._on_servers = on_exit, on_servers
        self._cluster = Cluster(self.address, self._pool, self.persistent)
        await self._cluster.connect()
        await self._look()
        waiting = [asyncio.ensure_future(node.looked.wait()) for node in self._nodes.values()]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=_START_S)
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
        meeting = _Meeting(len(parts))
        try:
            starts = (meeting.attended(node, lease, tuple(slices[name])) for name, node in parts.items())
            workers = await asyncio.gather(*starts, return_exceptions=True)
            if meeting.failure is not None:
                raise meeting.failure
        except BaseException:
            await self.stop_worker(lease.id)
            raise
        return _joined(dict(zip(parts, cast(list[WorkerAddress], workers))))

    async def stop_worker(self, lease_id: str) -> None:
        parts = self._parts.pop(lease_id, {})
        self._limits.pop(lease_id, None)
        await asyncio.gather(*(node.stop(lease_id) for node in parts.values()))

    async def limit_worker(self, lease_id: str, limits: Mapping[str, int]) -> None:
        parts = self._parts.get(lease_id)
        if not parts:
            raise EngineFailure(f"lease {lease_id} has no worker that could be told")
        before = self._limits.get(lease_id, {})
        told: list[Node] = []
        try:
            for node in parts.values():
                await node.limit(lease_id, limits)
                told.append(node)
        except (EngineFailure, InUse):
            for node in told:  # all of them, or none
                with contextlib.suppress(EngineFailure, InUse):
                    await node.limit(lease_id, before)
            raise
        self._limits[lease_id] = {**before, **limits}

    async def adopt(self, leases: Sequence[Lease]) -> dict[str, WorkerAddress]:
        """Also says (on_exit) how those ended that ended while no pool ran, and gives back their shares."""
        there = {node.name: node for node in self._nodes.values() if node.there}
        adopted = {}
        for lease in leases:
            names = dict.fromkeys(piece.server for piece in lease.slices)
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
                if index is not None:
                    node.claims.adopt(lease_id, index, units, group)
                    break
            else:
                await self._cluster.give_back(group)
        self._adopted = True
        for node in self._nodes.values():
            if node.there:
                await node.tidy(
                    lease.id for lease in leases if node in self._parts.get(lease.id, {}).values()
                )
            else:
                node.settled()
        return adopted

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
        raise EngineFailure(f"GPU server {name} is away")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._look()
                self._trouble = ""
            except Exception as e:  # Ray's own errors are of many kinds
                self._trouble = f"the Ray cluster does not say what nodes it has: {str(e).splitlines()[0]}"
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
                "keyfile": self.keyfile,
                "data_port": self.data_port,
                "attach_timeout_s": self.attach_timeout_s,
                "pool_id": f"{self._pool}/{found.id}",
            },
        }
        return Node(
            self._cluster,
            found,
            settings,
            silence_s=self.silence_s,
            log=self.log,
            on_change=self._changed,
            on_ended=self._part_ended,
        )

    def _changed(self) -> None:
        there = [node.server() for node in self._nodes.values() if node.there]
        self._on_servers(sorted(there, key=lambda server: server.name))

    def _part_ended(self, node: Node, lease_id: str, state: LeaseState, reason: str) -> None:
        others = [other for other in self._parts.pop(lease_id, {}).values() if other is not node]
        self._limits.pop(lease_id, None)
        for other in others:
            self._begin(other.stop(lease_id))
        if others and state is LeaseState.LOST:
            where = "" if node.name in reason else f" on GPU server {node.name}"
            reason = f"{reason}{where}; what the lease had on {_names(others)} ended with it"
        self._on_exit(lease_id, state, reason)

    def _begin(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Meeting:
    """Where a lease's workers wait until all of them can start; ``failure`` is why one of them could not."""

    def __init__(self, expected: int) -> None:
        self._expected = self._missing = expected
        self._over = asyncio.Event()
        self.failure: BaseException | None = None

    async def attended(self, node: Node, lease: Lease, pieces: tuple[Slice, ...]) -> WorkerAddress:
        try:
            return await node.start(lease, pieces, self._arrive if self._expected > 1 else None)
        except BaseException as e:
            self.failure = self.failure or e
            self._over.set()
            raise

    async def _arrive(self) -> None:
        self._missing -= 1
        if not self._missing:
            self._over.set()
        await self._over.wait()
        if self.failure is not None:
            raise EngineFailure("another server of the lease's is not ready")


def _joined(workers: Mapping[str, WorkerAddress]) -> WorkerAddress:
    """One lease's workers by server, as one address."""
    (_, first), *others = workers.items()
    return replace(first, elsewhere=dict(others))


def _names(nodes: Sequence[Node]) -> str:
    return ", ".join(node.name for node in nodes)

"""One GPU server of the cluster: its connection, its shares and its workers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from jupyter_gpupool.core.errors import EngineError, SliceInUse
from jupyter_gpupool.core.models import GPU, Lease, LeaseState, Server, Slice, WorkerAddress, WorkerUsage
from jupyter_gpupool.core.readings import ServerReading, from_json

from .agent import Agent
from .claims import Claims
from .cluster import AgentGone, Cluster, RayNode
from .fractions import UNIT, units
from .parking import NodeParking

#: How often an agent reports, in seconds.
_REPORT_INTERVAL_S = 1.0
#: How long an agent may take to start its process and to query NVML, in seconds.
_AGENT_START_TIMEOUT_S = 90.0
_STOP_TIMEOUT_S = 40.0
_RETRY_DELAY_S = 0.5
#: How long ending a lease waits for a worker that is just starting, in seconds.
_STARTING_TIMEOUT_S = 4.0

#: Called when a worker on this node has ended: node, lease id, state and reason.
PartEnded = Callable[["Node", str, LeaseState, str], None]

#: Called when a worker on this node has taken another one's place: node, lease id, and why the former one ended.
PartReplaced = Callable[["Node", str, str], None]


class Node:
    """Watches one agent for as long as Ray lists its node as alive.

    ``on_change`` is called when the node appears or disappears, or when others hold more or less of its GPUs.
    ``on_ended`` is called when a worker ends or its node is lost, ``on_replaced`` when another one has taken its place.
    If only the network was cut, such a worker is ended as soon as the node answers again.
    """

    def __init__(
        self,
        cluster: Cluster,
        node: RayNode,
        settings: Mapping[str, Any],
        *,
        node_timeout_s: float,
        log: Any,
        on_change: Callable[[], None],
        on_ended: PartEnded,
        on_replaced: PartReplaced,
        on_wanted: Callable[[str], None],
    ) -> None:
        self.id = node.id
        self.address = node.address
        self.name: str = settings["name"]
        self.claims = Claims(cluster, node)
        self.there = False
        self.warm = False
        self.failure = ""
        #: the leases that have, or are getting, a worker here; the agent ends all others when it is heard again
        self.leases: set[str] = set()
        self.workers: dict[str, WorkerAddress] = {}
        #: how workers ended while no pool ran, for one that is started again
        self.ended: dict[str, tuple[LeaseState, str]] = {}
        self.usage: dict[str, WorkerUsage] = {}
        self.readings: list[ServerReading] = []  # of its health, as heard last
        self.looked = asyncio.Event()  # the node answered, or its failure is known
        self._cluster = cluster
        self._node = node
        self._settings = settings
        self._timeout_s = node_timeout_s
        self._log = log
        self._on_change = on_change
        self._on_ended = on_ended
        self._on_replaced = on_replaced
        self.parking = NodeParking(self._told, on_wanted)
        self._gpus: tuple[GPU, ...] = ()
        self._agent: Any = None
        self._takes_client = False
        self._starting: dict[str, asyncio.Event] = {}
        self._heard = 0
        self._heard_at = time.monotonic()
        self._may_end_others = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Start watching the agent."""
        self._task = asyncio.create_task(self._watch())

    def settled(self) -> None:
        """Note that the workers found after a restart of the pool were adopted: all others may be ended now."""
        self._may_end_others.set()
        self.ended.clear()

    def server(self) -> Server:
        """Return the GPU server, with the memory that others hold of its GPUs."""
        taken = self.claims.taken()
        gpus = tuple(replace(g, taken_mib=-(-taken[g.index] * g.memory_mib // UNIT)) for g in self._gpus)
        return Server(self.name, self.address, gpus)

    def look(self, free: Mapping[str, float]) -> None:
        """Record what is free here according to Ray."""
        if self.claims.look(free) and self.there:
            self._on_change()

    def index_of(self, gpu_uuid: str) -> int | None:
        """Return a GPU's index on this node; None if it is not here."""
        return next((gpu.index for gpu in self._gpus if gpu.uuid == gpu_uuid), None)

    async def leave(self, why: str) -> None:
        """Note that Ray reports the node as gone."""
        if self._task is not None:
            self._task.cancel()
        self._lose(why)
        self.looked.set()
        for lease_id in self.claims.leases():
            await self.claims.give_back(lease_id)

    async def detach(self, end: bool) -> None:
        """Stop watching. ``end``: also end the agent and its workers."""
        if self._task is not None:
            self._task.cancel()
        if end and self._agent is not None:
            try:
                await self._cluster.call(self._agent.end, timeout_s=_STOP_TIMEOUT_S)
                await self._cluster.kill(self._agent)
            except (AgentGone, ConnectionError, TimeoutError):
                pass  # it has ended already

    # -- workers

    async def start(
        self,
        lease: Lease,
        pieces: tuple[Slice, ...],
        together: Callable[[], Awaitable[None]] | None = None,
        receives: bool = False,
    ) -> WorkerAddress:
        """Claim slices in Ray, and start their worker. Raises EngineError, and then leaves nothing behind.

        ``together``, for a lease with workers on other servers, returns when all of them can start: none is to wait
        for its holder while another one's server is not ready yet. ``receives``: another server sends it the lease.
        """
        if not self.there:
            raise EngineError(
                f"GPU server {self.name} does not answer; wait until it is back, or request GPUs of another one"
            )
        self.leases.add(lease.id)
        self._starting[lease.id] = over = asyncio.Event()
        try:
            await self.claim(lease.id, pieces)
            if together is not None:
                await self._asked(self._agent.warm)
                await together()
            first = lease.slices.index(pieces[0])
            # An older agent knows neither.
            client = lease.request.client if self._takes_client else ""
            said = await self._asked(
                self._method("receive") if receives else self._agent.start,
                lease.id,
                lease.request.secret_sha256,
                [asdict(piece) for piece in pieces],
                lease.ttl_s,
                *([first, client] if client else [first] if first else []),
            )
            if "failed" in said:
                raise EngineError(f"{self.name}: {said['failed']}")
            if lease.id not in self.leases:
                raise EngineError(
                    f"the lease ended, or GPU server {self.name} was away for a moment; ask again"
                )
        except BaseException:
            self.leases.discard(lease.id)
            await self._end(lease.id)
            raise
        finally:
            del self._starting[lease.id]
            over.set()
        self.workers[lease.id] = WorkerAddress(**said)
        return self.workers[lease.id]

    async def stop(self, lease_id: str) -> None:
        """End the worker of a lease and release its share; if the node does not answer, when it is back."""
        if lease_id not in self.leases:
            return
        self.leases.discard(lease_id)
        starting = self._starting.get(lease_id)
        if starting is not None:  # it notices that it is not wanted any more
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):  # a node's first one takes long
                await asyncio.wait_for(starting.wait(), _STARTING_TIMEOUT_S)
        else:
            await self._end(lease_id)

    async def claim(self, lease_id: str, pieces: Sequence[Slice]) -> None:
        """Claim slices in Ray. Raises EngineError."""
        await self.claims.take(
            lease_id, {p.index: (p.gpu_uuid, units(p.memory_mib, p.total_mib)) for p in pieces}
        )

    async def _end(self, lease_id: str) -> None:
        self.workers.pop(lease_id, None)
        self.parking.ended(lease_id)
        if not self.there:
            return
        try:
            await self._cluster.call(self._agent.stop, lease_id, timeout_s=_STOP_TIMEOUT_S)
        except (AgentGone, ConnectionError, TimeoutError) as e:
            self._log.warning("The worker of lease %s on %s: %s", lease_id, self.name, e or "no answer")
        else:  # otherwise when that is known
            await self.claims.give_back(lease_id)

    async def limit(self, lease_id: str, pieces: Mapping[str, int]) -> None:
        """Limit a worker to so many MiB by GPU uuid, and Ray's shares with it. Raises SliceInUse and EngineError."""
        sizes = {
            g.uuid: (g.index, units(mib, g.memory_mib)) for g in self._gpus if (mib := pieces.get(g.uuid))
        }
        held = self.claims.held_by(lease_id)
        for uuid, (index, wanted) in sizes.items():
            if wanted > held.get(index, 0):
                await self.claims.change(lease_id, index, uuid, wanted)
        said = await self._asked(self._agent.limit, lease_id, dict(pieces))
        if "in_use" in said:
            raise SliceInUse(said["in_use"])
        if "failed" in said:
            raise EngineError(said["failed"])
        for uuid, (index, wanted) in sizes.items():
            if wanted < held.get(index, 0):
                await self.claims.change(lease_id, index, uuid, wanted)

    async def introduce(self, lease_id: str, others: Mapping[str, WorkerAddress]) -> None:
        """Let the worker of a lease be linked to these, by their names. Raises EngineError."""
        addresses = {peer: address.to_json() for peer, address in others.items()}
        await self._told("introduce", lease_id, addresses)

    async def introduce_if_possible(self, lease_id: str, others: Mapping[str, WorkerAddress]) -> None:
        """As :meth:`introduce`. Where it cannot be, clients do without."""
        try:
            await self.introduce(lease_id, others)
        except EngineError as e:
            self._log.warning(
                "The worker of lease %s on %s is linked to no other: %s", lease_id, self.name, e
            )

    # -- together with the lease's workers on other servers

    async def tell(self, lease_id: str, what: str, **fields: Any) -> dict[str, Any]:
        """Ask a worker for what workers of a lease do together, see transport/control.py. Raises EngineError."""
        return await self._told("tell", lease_id, what, fields)

    # -- moving

    async def send(self, lease_id: str, to: WorkerAddress) -> tuple[int, float]:
        """Send a lease to another server's worker. Return its bytes, and the seconds for which it rested.

        Raises EngineError.
        """
        said = await self._told("send", lease_id, to.to_json())
        return int(said["bytes"]), float(said["rest_s"])

    async def send_ahead(self, lease_id: str, to: WorkerAddress) -> None:
        """Send ahead what can be while the lease goes on; ``send_rest`` is to follow. Raises EngineError."""
        await self._told("send_ahead", lease_id, to.to_json())

    async def stay(self, lease_id: str) -> None:
        """Let a lease that was sent go on here after all. Raises EngineError."""
        await self._told("stay", lease_id)

    async def serve(self, lease_id: str) -> None:
        """Let a lease that has arrived go on here. Raises EngineError."""
        await self._told("serve", lease_id)

    async def depart(self, lease_id: str, to: WorkerAddress) -> None:
        """End the worker of a lease that goes on at another server's, and release its share.

        If the node does not answer, when it is back; until then the worker executes nothing.
        """
        self.leases.discard(lease_id)
        self.workers.pop(lease_id, None)
        self.parking.ended(lease_id)
        if not self.there:
            return
        try:
            await self._cluster.call(self._method("leave"), lease_id, to.to_json(), timeout_s=_STOP_TIMEOUT_S)
        except (AgentGone, ConnectionError, TimeoutError) as e:
            self._log.warning(
                "Lease %s has left %s, whose worker may run on: %s", lease_id, self.name, e or "no answer"
            )
        else:
            await self.claims.give_back(lease_id)

    async def _told(self, method: str, *args: Any) -> dict[str, Any]:
        said: dict[str, Any] = await self._asked(self._method(method), *args)
        if "failed" in said:
            raise EngineError(f"{self.name}: {said['failed']}")
        return said

    def _method(self, name: str) -> Any:
        found = getattr(self._agent, name, None)
        if found is None:
            raise EngineError(f"the agent on {self.name} is of an earlier version, which does not know that")
        return found

    def adopt(self, lease_id: str) -> None:
        """Count a lease as having a worker here."""
        self.leases.add(lease_id)

    async def _asked(self, method: Any, *args: Any) -> Any:
        try:
            return await self._cluster.call(method, *args, timeout_s=150.0)
        except (AgentGone, ConnectionError, TimeoutError) as e:
            raise EngineError(f"GPU server {self.name} does not answer: {e or 'it took too long'}") from None

    # -- watching

    async def _watch(self) -> None:
        while True:
            try:
                await self._meet()
                while True:
                    await self._hear()
            except AgentGone as e:
                self._agent = None
                self._lose(f"the pool's agent on {self.name} ended ({e})")
                for lease_id in [lease for lease in self.claims.leases() if lease not in self.leases]:
                    await self.claims.give_back(lease_id)
            except TimeoutError:
                self._lose(f"nothing was heard of GPU server {self.name} for {self._timeout_s:g} s")
            except ConnectionError as e:
                self._log.warning("GPU server %s: %s", self.name, e)
                if time.monotonic() - self._heard_at > self._timeout_s:
                    self._lose(f"GPU server {self.name} cannot be reached: {e}")
            except EngineError as e:
                self.failure = str(e)
            except asyncio.CancelledError:
                raise
            except Exception:
                self._log.exception("GPU server %s cannot be watched", self.name)
            self.looked.set()
            await asyncio.sleep(_RETRY_DELAY_S)

    async def _meet(self) -> None:
        """Start the agent if there is none, and end workers that no lease holds."""
        if self._agent is None:
            self._agent = await self._cluster.agent(self._node, lambda: Agent, self._settings)
            self._heard = 0
        patience = self._timeout_s if self.there else _AGENT_START_TIMEOUT_S
        said = await self._cluster.call(self._agent.describe, timeout_s=patience)
        if "failed" in said:
            raise EngineError(f"{self.name}: {said['failed']}")
        self.failure = ""
        self.name = said["name"]
        self._gpus = tuple(GPU(**gpu) for gpu in said["gpus"])
        self._takes_client = said.get("takes_client", False)
        self.parking.hear(said)
        if self.there:
            return
        if self._may_end_others.is_set():
            await self._tidy()
        else:
            self.workers = {lease: WorkerAddress(**w) for lease, w in said["workers"].items()}
            self.ended.update({k: (LeaseState(v[0]), v[1]) for k, v in said.get("ended", {}).items()})
        self.there = True
        self._log.info("GPU server %s has joined, with %d GPUs", self.name, len(self._gpus))
        self.looked.set()
        self._on_change()

    async def _tidy(self) -> None:
        await self._cluster.call(self._agent.keep, list(self.leases), timeout_s=_STOP_TIMEOUT_S)
        for lease_id in [lease for lease in self.claims.leases() if lease not in self.leases]:
            await self.claims.give_back(lease_id)

    async def tidy(self, known: Iterable[str]) -> None:
        """End the workers of all but these leases."""
        self.leases.update(known)
        try:
            await self._tidy()
        except (AgentGone, ConnectionError, TimeoutError) as e:
            self._log.warning("GPU server %s: %s", self.name, e or "no answer")
        self.settled()

    async def _hear(self) -> None:
        said = await self._cluster.call(
            self._agent.news, self._heard, _REPORT_INTERVAL_S, timeout_s=self._timeout_s
        )
        self._heard_at = time.monotonic()
        self.warm, self.failure = said["warm"], said["failure"]
        self.parking.hear(said)
        self.usage = {lease: WorkerUsage(**usage) for lease, usage in said["usage"].items()}
        ahead = (
            said["clock"] - time.time() if "clock" in said else None
        )  # by the time that the answer took, too
        self.readings = [
            replace(from_json(reading), server=self.name, clock_ahead_s=ahead)
            for reading in said.get("readings", ())  # an older agent sends none
        ]
        for number, lease_id, worker, reason in said.get("replaced", ()):  # an older agent replaces none
            self._heard = max(self._heard, number)
            if lease_id in self.leases:
                self.workers[lease_id] = WorkerAddress(**worker)
                self._on_replaced(self, lease_id, reason)
        for number, lease_id, state, reason in said["ended"]:
            self._heard = max(self._heard, number)
            if not self._may_end_others.is_set():
                self.ended[lease_id] = LeaseState(state), reason
            self.workers.pop(lease_id, None)
            self.parking.ended(lease_id)
            await self.claims.give_back(lease_id)
            if lease_id in self.leases:
                self.leases.discard(lease_id)
                self._on_ended(self, lease_id, LeaseState(state), reason)

    def _lose(self, why: str) -> None:
        if self.there:
            self._log.error("GPU server %s is lost: %s", self.name, why)
        self.there = False
        self.usage = {}
        lost, self.leases = self.leases, set()
        self.workers = {}
        self._on_change()
        for lease_id in lost:
            self._on_ended(self, lease_id, LeaseState.LOST, why)

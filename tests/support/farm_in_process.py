"""The engine of a farm in this process, with its agents and their workers, but no Ray: shares are given at once."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.core.models import Lease, LeaseState, Request, Slice, WorkerAddress
from jupyter_gpupool.engines.ray import engine as engine_module
from jupyter_gpupool.engines.ray.cluster import RayNode
from jupyter_gpupool.engines.ray.engine import RayEngine
from jupyter_gpupool.gpus.emulated import emulated_gpus
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec

GPUS = 2
SECRET = "known to the client alone"


@dataclass(frozen=True)
class _Share:
    name: str
    units: int
    id: bytes = field(default_factory=lambda: uuid.uuid4().bytes)


class Shares:
    """What stands in for a cluster: nodes of these names with two GPUs each, whose agents are in this process.

    ``agents`` outlive an engine, as those of Ray do.
    """

    def __init__(self, names: tuple[str, ...], agents: dict[str, Any]) -> None:
        self.shares: list[_Share] = []
        self.agents = agents
        self._nodes = [
            RayNode(name, name, f"127.0.0.{number}", GPUS, {"GPU": float(GPUS)})
            for number, name in enumerate(names, 2)
        ]
        self._index = {gpu.uuid: gpu.index for name in names for gpu in emulated_gpus(name, GPUS)}

    async def connect(self) -> None: ...
    async def disconnect(self) -> None: ...
    async def kill(self, agent: Any) -> None: ...

    async def nodes(self) -> list[RayNode]:
        return self._nodes

    async def agent(self, node: RayNode, make: Callable[[], type], settings: Mapping[str, Any]) -> Any:
        if node.name not in self.agents:
            self.agents[node.name] = make()(dict(settings))
        return self.agents[node.name]

    async def call(self, method: Any, *args: Any, timeout_s: float) -> Any:
        return await asyncio.wait_for(method(*args), timeout_s)

    def claim_name(self, lease_id: str, gpu_uuid: str) -> str:
        return f"{lease_id}:{gpu_uuid}"

    async def claim(self, node: str, units: int, name: str) -> _Share:
        self.shares.append(_Share(name, units))
        return self.shares[-1]

    async def granted(self, share: _Share, timeout_s: float) -> bool:
        return True

    async def gpu_of(self, share: _Share, timeout_s: float) -> str:
        return str(self._index[share.name.split(":")[1]])

    async def give_back(self, share: _Share) -> None:
        if share in self.shares:
            self.shares.remove(share)

    async def claims(self) -> list[tuple[str, str, int, Any]]:
        return [(*share.name.split(":"), share.units, share) for share in self.shares]  # type: ignore[misc]


class Farm:
    """A farm of servers of these names. Its engine runs in a thread of its own, so that a program can run in this."""

    def __init__(
        self, names: tuple[str, ...], folder: Path, patch: pytest.MonkeyPatch, **options: Any
    ) -> None:
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder))
        self.cluster = Shares(names, {})
        patch.setattr(engine_module, "Cluster", lambda *args: self.cluster)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._options = options
        self.ended: dict[str, tuple[LeaseState, str]] = {}
        self.woken: list[str] = []
        self.is_secure = bool(options.get("certfile"))
        self.start()

    def start(self) -> None:
        """As a pool does, also after another one was killed."""
        self.engine = RayEngine(emulate="always", persistent=True, attach_timeout_s=300.0, **self._options)
        self.engine.on_wake(self.woken.append)
        self.do(self.engine.start(lambda lease_id, *end: self.ended.__setitem__(lease_id, end)))

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def begin(self, work: Coroutine[Any, Any, Any]) -> Any:
        """As :meth:`do`, and do not wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def restart(self) -> None:
        """As where a pool is killed and started again: its agents and their workers go on."""
        self.do(self.engine.stop())
        self.start()

    def stop(self) -> None:
        self.do(self.engine.stop())
        for agent in self.cluster.agents.values():
            self.do(agent.end())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def piece(self, server: str, index: int, mib: int = 100) -> Slice:
        gpu = emulated_gpus(server, GPUS)[index]
        return Slice(gpu.uuid, server, index, gpu.name, mib, gpu.memory_mib, True)

    def lease(self, *where: tuple[str, int]) -> Lease:
        """A lease on these GPUs, whose workers are up."""
        digest = hashlib.sha256(SECRET.encode()).hexdigest()
        request = Request(
            str(uuid.uuid4()), "somebody", len(where), memory_mib=100, spread=True, secret_sha256=digest
        )
        lease = Lease(request, LeaseState.GRANTED, tuple(self.piece(*one) for one in where), ttl_s=60.0)
        worker = self.do(self.engine.start_worker(lease))
        return replace(lease, state=LeaseState.ACTIVE, worker=worker)

    def spec(self, lease: Lease) -> AttachSpec:
        """What a client needs to use it."""
        assert lease.worker is not None
        devices = tuple(
            DeviceSpec(n, s.gpu_uuid, s.name, s.memory_mib, s.total_mib, True)
            for n, s in enumerate(lease.slices)
        )
        workers = [lease.worker.on(piece.server) for piece in lease.slices]
        addresses = tuple((worker.host, worker.port) for worker in workers)
        first = (lease.worker.host, lease.worker.port)
        spec = AttachSpec(lease.id, *first, SECRET, devices, lease.ttl_s, addresses=addresses)
        return replace(spec, secure=self.is_secure)

    def moving(self, lease: Lease, left: str, reached: str) -> Lease:
        """The lease on the way from one of its servers to another one."""
        there = tuple(
            self.piece(reached, piece.index) if piece.server == left else piece for piece in lease.slices
        )
        return replace(lease, moving_to=there)

    def move(self, lease: Lease, left: str, reached: str) -> Lease:
        """Let what a lease has on one server go on at another one. Raises EngineError."""
        moving = self.moving(lease, left, reached)
        worker: WorkerAddress = self.do(self.engine.move_worker(moving))
        return replace(moving, state=LeaseState.ACTIVE, slices=moving.moving_to, moving_to=(), worker=worker)

    def shares(self) -> dict[str, int]:
        """How many GPUs each lease has a share of."""
        found: dict[str, int] = {}
        for share in self.cluster.shares:
            lease_id = share.name.split(":")[0]
            found[lease_id] = found.get(lease_id, 0) + 1
        return found

"""The Ray cluster: its nodes, an agent on each, and shares of their GPUs.

A share is a placement group of one bundle on exactly one node. Ray chooses the GPU of the node, and
:meth:`Cluster.gpu_of` finds out which. Calls to Ray may block, so they run in threads.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jupyter_gpupool.core.errors import EngineError

from .fractions import UNIT

#: Everything of every pool is in one namespace of Ray; names tell the pools apart.
_NAMESPACE = "gpupool"


@dataclass(frozen=True)
class RayNode:
    """A live node of the cluster with GPUs. ``free``: its free resources."""

    id: str
    name: str
    address: str
    gpus: int
    free: Mapping[str, float]


class Cluster:
    """A connection to one cluster. ``pool`` distinguishes this pool's names from those of others."""

    def __init__(self, address: str, pool: str, detached: bool) -> None:
        self._address = address
        self._pool = pool
        self._lifetime = "detached" if detached else None
        self._ray: Any = None
        self._groups: Any = None
        self._strategies: Any = None
        self._errors: Any = None
        self._state: Any = None
        self._ask: Any = None

    async def connect(self) -> None:
        """Join the cluster. Raises EngineError."""
        if self._ray is None:
            await asyncio.to_thread(self._connect)  # not in the main thread, whose signals are the pool's

    def _connect(self) -> None:
        # The pool sends no usage statistics; whether the cluster's head does is its administrator's choice.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray would take SIGTERM for a failure, and the pool could not end in good order.
        os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
        try:
            ray = importlib.import_module("ray")
        except ImportError as e:
            raise EngineError(
                f"Ray cannot be imported ({e}); install it on the pool and on every GPU server: "
                "pip install 'jupyter_gpupool[ray]'"
            ) from None
        self._groups = importlib.import_module("ray.util.placement_group")
        self._strategies = importlib.import_module("ray.util.scheduling_strategies")
        self._errors = importlib.import_module("ray.exceptions")
        self._state = importlib.import_module("ray._private.state")
        if not ray.is_initialized():
            try:
                ray.init(
                    address=self._address,
                    namespace=_NAMESPACE,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            except Exception as e:  # of many kinds
                line = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
                raise EngineError(f"no Ray cluster can be joined at {self._address!r}: {line}") from None
        self._ray = ray
        self._ask = ray.remote(num_cpus=0, max_retries=0)(_gpu_ids)

    async def disconnect(self) -> None:
        """Leave the cluster."""
        if self._ray is not None:
            ray, self._ray = self._ray, None
            await asyncio.to_thread(ray.shutdown)

    async def nodes(self) -> list[RayNode]:
        """Return the live nodes with GPUs."""
        return await asyncio.to_thread(self._nodes)

    def _nodes(self) -> list[RayNode]:
        free = self._state.available_resources_per_node()
        found = []
        for node in self._ray.nodes():
            count = int(node["Resources"].get("GPU", 0))
            if node["Alive"] and count and node["NodeID"] in free:
                address = node["NodeManagerAddress"]
                named = node.get("NodeName") or address
                name = node["NodeManagerHostname"] if named == address else named
                found.append(RayNode(node["NodeID"], name, address, count, free[node["NodeID"]]))
        return found

    # -- agents

    async def agent(self, node: RayNode, make: Callable[[], type], settings: Mapping[str, Any]) -> Any:
        """Return a handle of the agent on a node; start the agent if there is none."""

        def get() -> Any:
            actor = self._ray.remote(make())
            return actor.options(
                name=f"gpupool-{self._pool}-{node.id}",
                namespace=_NAMESPACE,
                lifetime=self._lifetime,
                get_if_exists=True,
                num_cpus=0,
                max_restarts=0,
                max_concurrency=1000,
                scheduling_strategy=self._strategies.NodeAffinitySchedulingStrategy(node.id, soft=False),
            ).remote(dict(settings))

        return await asyncio.to_thread(get)

    async def call(self, method: Any, *args: Any, timeout_s: float) -> Any:
        """Return the agent's answer. Raises TimeoutError, ConnectionError, and AgentGone if it will never answer."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(method.remote(*args).future()), timeout_s)
        except asyncio.TimeoutError:
            raise TimeoutError from None
        except self._errors.ActorUnavailableError as e:
            raise ConnectionError(_first_line(e)) from None
        except self._errors.RayActorError as e:
            raise AgentGone(_first_line(e)) from None
        except self._errors.RayError as e:
            raise ConnectionError(_first_line(e)) from None

    async def kill(self, agent: Any) -> None:
        """Kill an agent."""
        await asyncio.to_thread(self._ray.kill, agent)

    # -- shares

    def claim_name(self, lease_id: str, gpu_uuid: str) -> str:
        """Return a new name for a share, from which :meth:`claims` reads the lease and the GPU."""
        return f"gpupool:{self._pool}:{lease_id}:{gpu_uuid}:{secrets.token_hex(4)}"

    async def claim(self, node: str, units: int, name: str) -> Any:
        """Request a share of any GPU of a node. Ray may grant it later; see :meth:`granted`."""

        def ask() -> Any:
            return self._groups.placement_group(
                [{"GPU": units / UNIT}],
                strategy="STRICT_PACK",
                name=name,
                lifetime=self._lifetime,
                bundle_label_selector=[{"ray.io/node-id": node}],
            )

        return await asyncio.to_thread(ask)

    async def granted(self, group: Any, timeout_s: float) -> bool:
        """Return whether Ray grants the share within ``timeout_s`` seconds."""
        return await asyncio.to_thread(group.wait, math.ceil(timeout_s))  # Ray takes whole seconds

    async def gpu_of(self, group: Any, timeout_s: float) -> str | None:
        """Return Ray's number of the share's GPU; None if it is not found out in time."""
        strategy = self._strategies.PlacementGroupSchedulingStrategy(group, 0)
        task = self._ask.options(num_gpus=1 / UNIT, scheduling_strategy=strategy).remote()
        try:
            ids = await asyncio.wait_for(asyncio.wrap_future(task.future()), timeout_s)
        except (TimeoutError, asyncio.TimeoutError, self._errors.RayError):
            return None
        return str(ids[0]) if ids else None

    async def give_back(self, group: Any) -> None:
        """Release a share."""
        await asyncio.to_thread(self._groups.remove_placement_group, group)

    async def claims(self) -> list[tuple[str, str, int, Any]]:
        """Return this pool's shares, also those from before a restart: lease, GPU uuid, units, placement group."""

        def find() -> list[tuple[str, str, int, Any]]:
            prefix = f"gpupool:{self._pool}:"
            table = self._groups.placement_group_table().values()
            found = []
            for entry in table:
                name = entry["name"]
                if not name.startswith(prefix) or entry["state"] == "REMOVED":
                    continue
                try:
                    group = self._groups.get_placement_group(name)
                except ValueError:
                    continue  # removed just now
                _, _, lease_id, gpu_uuid, _ = name.split(":")
                found.append((lease_id, gpu_uuid, round(entry["bundles"][0]["GPU"] * UNIT), group))
            return found

        return await asyncio.to_thread(find)


class AgentGone(Exception):
    """The agent has died, and its workers with it."""


def _gpu_ids() -> list[Any]:
    import ray

    return list(ray.get_gpu_ids())


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""The environments of a GPU server: interpreters with different releases of PyTorch, each with a warm parent.

A lease's worker is forked from the parent that fits its client best. The pool's own interpreter is the first
environment; its parent is started with the engine. Others are configured, or recorded by
``gpupool server environment add``, also while the engine runs. Their parents are started when a lease needs them, and
end when they have had no worker for a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from logging import LoggerAdapter
from typing import Any

from jupyter_gpupool.core import torch_release
from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.core.models import Lease, WorkerAddress
from jupyter_gpupool.engines import environment_records as records
from jupyter_gpupool.engines.environment_records import OWN
from jupyter_gpupool.transport.specs import WorkerSpec

from .environment import Environment, fitting
from .environment_check import release_in
from .warm_parent import WarmParent


class Environments:
    """Starts each worker from the environment that fits.

    ``own``: the parent of the pool's own interpreter, ``own_runs`` in that environment. ``parent_of`` makes the parent
    of another one. ``idle_s``: how long such a parent is kept without a worker. ``folder``: of the records.
    """

    def __init__(
        self,
        own: WarmParent,
        own_runs: Environment,
        parent_of: Callable[[Environment], WarmParent],
        *,
        idle_s: float,
        folder: str,
        log: Any,
    ) -> None:
        self._parents = {own_runs: own}
        self._own = own_runs
        self._parent_of = parent_of
        self._idle_s = idle_s
        self._folder = folder
        self._log: LoggerAdapter[Any] = log
        self._pythons: dict[str, str] = {}
        self._operators: dict[str, Sequence[str]] = {}
        self._known: dict[str, Environment] = {}
        self._ends: dict[Environment, asyncio.TimerHandle] = {}
        self._recorded: tuple[Any, ...] = ()
        self._reading = asyncio.Lock()

    async def start(self, pythons: Mapping[str, str], operators: Mapping[str, Sequence[str]]) -> None:
        """Look which release of PyTorch each of the configured and of the recorded interpreters has.

        One without any is left out. ``operators``: those of other libraries that are allowed, by environment.
        """
        self._pythons, self._operators, self._known = dict(pythons), dict(operators), {}
        await self._read()
        for name in sorted(self._operators.keys() - {OWN, *self._known, *pythons}):
            self._log.warning("Operators are allowed in the environment %s, which there is not", name)

    async def start_worker(self, lease: Lease, spec: WorkerSpec, host: str, port: int = 0) -> WorkerAddress:
        """Fork a worker in the environment that fits the lease's client. Raises EngineError."""
        if records.state_of(self._folder) != self._recorded:
            await self._read()
        client = torch_release.marked(lease.request.client)
        chosen = fitting(client, self._known.values())
        try:
            worker = await self._parent(chosen).start_worker(spec, host, port)
        except EngineError as e:
            if chosen.name == OWN:
                raise
            raise EngineError(f"environment {chosen.name}: {e}") from None
        if len(self._known) > 1:
            self._log.info(
                "Lease %s computes with PyTorch %s (environment %s); its client has %s",
                lease.id,
                worker.torch,
                chosen.name,
                client or "not said",
            )
        return worker

    async def stop(self) -> None:
        """End all parents but the own one."""
        for timer in self._ends.values():
            timer.cancel()
        self._ends.clear()
        others = [self._parents.pop(each) for each in list(self._parents) if each.name != OWN]
        for parent in others:
            parent.is_stopping = True
        await asyncio.gather(*(parent.stop() for parent in others))

    # -- which there are

    async def _read(self) -> None:
        """Find the environments anew. Where one has changed, new leases get a new parent; the old one idles out."""
        async with self._reading:
            state = records.state_of(self._folder)
            if self._known and state == self._recorded:
                return  # another lease has done it meanwhile
            recorded, troubles = records.read_all(self._folder)
            for trouble in troubles:
                self._log.warning("An environment is left out: %s", trouble)
            pythons = {name: record.python for name, record in recorded.items()} | self._pythons
            allowed = {name: {*self._operators.get(name, ())} for name in pythons}
            for name, record in recorded.items():
                allowed[name] |= {*record.operators}
            wanted = [
                Environment(name, python, "", tuple(sorted(allowed[name])))
                for name, python in pythons.items()
            ]
            before = set(self._known)
            known = {OWN: self._own}
            found = await asyncio.gather(*(release_in(each.python) for each in wanted))
            for environment, (release, trouble) in zip(wanted, found):
                if trouble:
                    self._log.warning("The environment %s is left out: %s", environment.name, trouble)
                else:
                    known[environment.name] = replace(environment, release=release)
            for name in sorted(before - set(known)):
                self._log.info("The environment %s gets no more leases", name)
            for name in sorted(set(known) - before - {OWN}):
                self._log.info("The environment %s has PyTorch %s", name, known[name].release)
            self._known, self._recorded = known, state

    # -- their parents

    def _parent(self, environment: Environment) -> WarmParent:
        if environment.name != OWN:
            self._end_later(environment)
            if environment not in self._parents:
                self._parents[environment] = self._parent_of(environment)
        return self._parents[environment]

    def _end_later(self, environment: Environment) -> None:
        """End the parent once it has had no worker for a while."""
        if environment in self._ends:
            self._ends[environment].cancel()
        loop = asyncio.get_running_loop()
        self._ends[environment] = loop.call_later(self._idle_s, self._end_if_idle, environment)

    def _end_if_idle(self, environment: Environment) -> None:
        parent = self._parents.get(environment)
        if parent is None or parent.is_busy:
            self._end_later(environment)
            return
        del self._ends[environment], self._parents[environment]
        self._log.info("The environment %s has no lease, so its warm parent ends", environment.name)
        ending = asyncio.ensure_future(parent.stop())
        ending.add_done_callback(lambda done: done.exception())

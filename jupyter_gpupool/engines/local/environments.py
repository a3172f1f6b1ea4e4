"""The environments of a GPU server: interpreters with different releases of PyTorch, each with a warm parent.

A lease's worker is forked from the parent that fits its client best. The pool's own interpreter is the first
environment; its parent is started with the engine. Others are started when a lease needs them, and end when they have
had no worker for a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from logging import LoggerAdapter
from typing import Any

from jupyter_gpupool.core import torch_release
from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.core.models import Lease, WorkerAddress
from jupyter_gpupool.transport.specs import WorkerSpec

from .warm_parent import WarmParent

#: The name of the pool's own interpreter.
OWN = "default"
#: How long an interpreter may take to name its release of PyTorch, in seconds.
_LOOK_TIMEOUT_S = 60.0
_LOOK = "import importlib.metadata; print(importlib.metadata.version('torch'))"


@dataclass(frozen=True)
class Environment:
    """An interpreter and its release of PyTorch, such as ``2.14.1``."""

    name: str
    python: str
    release: str


def fitting(client: str, environments: Collection[Environment]) -> Environment:
    """Return the environment for a client with that release of PyTorch; "": a client that names none.

    The same release is best, then the newest of the same minor release, then the newest of all: operators are
    translated between releases. A client that names none gets the first environment.
    """
    first = next(iter(environments))
    if not client:
        return first
    wanted = _numbers(client)

    def rank(environment: Environment) -> tuple[bool, bool, tuple[int, ...], bool]:
        has = _numbers(environment.release)
        return has == wanted, has[:2] == wanted[:2], has, environment is first

    return max(environments, key=rank)


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")) if release else ()


class Environments:
    """Starts each worker from the environment that fits. ``own``: the parent of the pool's own interpreter.

    ``parent_of`` makes the parent of another interpreter. ``idle_s``: how long such a parent is kept without a worker.
    """

    def __init__(
        self, own: WarmParent, parent_of: Callable[[str], WarmParent], idle_s: float, log: Any
    ) -> None:
        self._parents = {OWN: own}
        self._parent_of = parent_of
        self._idle_s = idle_s
        self._log: LoggerAdapter[Any] = log
        self._known: dict[str, Environment] = {}
        self._ends: dict[str, asyncio.TimerHandle] = {}

    async def start(self, pythons: Mapping[str, str]) -> None:
        """Look which release of PyTorch each of the interpreters, by name, has. One without any is left out."""
        self._known = {OWN: Environment(OWN, "", torch_release.installed())}
        found = await asyncio.gather(*(_release(python) for python in pythons.values()))
        for (name, python), (release, trouble) in zip(pythons.items(), found):
            if trouble:
                self._log.warning("The environment %s is left out: %s", name, trouble)
            else:
                self._known[name] = Environment(name, python, release)

    @property
    def releases(self) -> dict[str, str]:
        """The release of PyTorch of each environment that can be used, by its name."""
        return {name: environment.release for name, environment in self._known.items()}

    async def start_worker(self, lease: Lease, spec: WorkerSpec, host: str) -> WorkerAddress:
        """Fork a worker in the environment that fits the lease's client. Raises EngineError."""
        client = torch_release.marked(lease.request.client)
        chosen = fitting(client, self._known.values())
        try:
            worker = await self._parent(chosen).start_worker(spec, host)
        except EngineError as e:
            if chosen.name == OWN:
                raise
            raise EngineError(f"environment {chosen.name}: {e}") from None
        if len(self._known) > 1:
            self._log.info(
                "Lease %s computes with PyTorch %s (environment %s); its client has %s",
                lease.id,
                chosen.release,
                chosen.name,
                client or "not said",
            )
        return worker

    async def stop(self) -> None:
        """End all parents but the own one."""
        for timer in self._ends.values():
            timer.cancel()
        self._ends.clear()
        others = [self._parents.pop(name) for name in list(self._parents) if name != OWN]
        for parent in others:
            parent.is_stopping = True
        await asyncio.gather(*(parent.stop() for parent in others))

    def _parent(self, environment: Environment) -> WarmParent:
        if environment.name != OWN:
            self._end_later(environment.name)
            if environment.name not in self._parents:
                self._parents[environment.name] = self._parent_of(environment.python)
        return self._parents[environment.name]

    def _end_later(self, name: str) -> None:
        """End the parent once it has had no worker for a while."""
        if name in self._ends:
            self._ends[name].cancel()
        self._ends[name] = asyncio.get_running_loop().call_later(self._idle_s, self._end_if_idle, name)

    def _end_if_idle(self, name: str) -> None:
        parent = self._parents.get(name)
        if parent is None or parent.is_busy:
            self._end_later(name)
            return
        del self._ends[name], self._parents[name]
        self._log.info("The environment %s has no lease, so its warm parent ends", name)
        ending = asyncio.ensure_future(parent.stop())
        ending.add_done_callback(lambda done: done.exception())


async def _release(python: str) -> tuple[str, str]:
    """Return an interpreter's release of PyTorch, or else what is wrong, in one line."""
    try:
        process = await asyncio.create_subprocess_exec(
            python, "-c", _LOOK, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
    except OSError as e:
        return "", f"{python} cannot be run: {e.strerror or e}"
    try:
        out, err = await asyncio.wait_for(process.communicate(), _LOOK_TIMEOUT_S)
    except (TimeoutError, asyncio.TimeoutError):
        process.kill()
        await process.wait()
        return "", f"{python} does not answer within {_LOOK_TIMEOUT_S:g} s"
    release = torch_release.release_of(out.decode(errors="replace").strip())
    if process.returncode or not release:
        return (
            "",
            f"{python} has no PyTorch; install it there: {python} -m pip install 'jupyter_gpupool[torch]'",
        )
    return release, ""

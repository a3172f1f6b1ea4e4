"""Shuts a worker in. What it needs was opened before."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from . import landlock, layers, mounts, namespaces, privileges, seccomp, worker_paths

#: What CUDA needs, and what its driver makes when it is loaded.
_CUDA_DEVICE = "/dev/nvidia-uvm"


class NotShutIn(Exception):
    """A layer that this kernel has could not be entered; the message is the reason."""


@dataclass(frozen=True)
class Sandbox:
    """The sandbox of the workers of one process: ``lacks`` has why the kernel has not each layer, empty if it has it.

    ``environment``: where this process finds its code.
    """

    mode: layers.Mode = "off"
    environment: tuple[str, ...] = ()
    lacks: Mapping[str, str] = field(default_factory=dict)

    def missing(self, real: bool) -> dict[str, str]:
        """Return why a worker, of a lease with GPUs that are not emulated, lacks each layer; empty if it has it."""
        return layers.missing(self.mode, self.lacks, real, os.path.exists(_CUDA_DEVICE))

    @property
    def objection(self) -> str:
        """Why no worker may start; empty if nothing is wrong."""
        return layers.objection(self.mode, self.lacks)

    def refuses_programs(self, real: bool) -> bool:
        """Whether a worker of a lease with such GPUs can start no program, so that another process compiles for it."""
        return not self.missing(real)[layers.SYSTEM_CALLS] and not (real and self.mode != "require")

    def enter(self, own: Path, real: bool, with_programs: bool = False) -> None:
        """Shut this process in, for good; it has one thread. ``own``: its own directory. Raises NotShutIn.

        ``with_programs``: let it start programs, though a worker could not.
        """
        wanted = [layer for layer, why in self.missing(real).items() if not why]
        with_programs = with_programs or not self.refuses_programs(real)
        with_driver = real and self.mode != "require"
        try:
            enter(wanted, own, self.environment, real, with_driver, with_programs)
        except OSError as e:
            raise NotShutIn(e.strerror or str(e)) from None


def enter(
    wanted: Collection[str],
    own: Path,
    environment: Iterable[str],
    real: bool,
    with_driver: bool,
    with_programs: bool = False,
) -> None:
    """Enter these layers. ``with_driver``: make those calls too that a GPU's driver might need. Raises OSError."""
    if not wanted:
        return
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise OSError(f"{threads} threads run already, and the others would stay outside")
    for layer, enter_layer in _entrances(own, environment, real, with_driver, with_programs).items():
        if layer in wanted:
            enter_layer()


def _entrances(
    own: Path, environment: Iterable[str], real: bool, with_driver: bool, with_programs: bool
) -> dict[str, Callable[[], None]]:
    machine = platform.machine()
    rules = worker_paths.rules(environment, str(own), real)
    return {
        layers.NAMESPACES: lambda: namespaces.enter(machine),
        layers.MOUNTS: lambda: mounts.enter([rule.path for rule in rules if rule.path != str(own)], own),
        layers.PRIVILEGES: lambda: privileges.enter(machine),
        layers.FILES: lambda: landlock.enter(rules),
        layers.SYSTEM_CALLS: lambda: seccomp.enter(
            machine, seccomp.worker_filter(machine, os.getpid(), with_driver, with_programs)
        ),
    }


def prepare(mode: layers.Mode, folder: Path) -> Sandbox:
    """Return the sandbox for forks of this process, which has one thread and has imported what workers use.

    Finds out by trying, in a child that ends at once: whether a kernel has a layer does not say whether a container
    lets anybody use it.
    """
    environment = tuple(worker_paths.environment_paths(sys.modules, sys.path))
    if mode != "off":  # once for all forks: they look it up
        mounts.view_of(tuple(rule.path for rule in worker_paths.rules(environment, "", real=False)[:-1]))
    lacks = {} if mode == "off" else _try(folder, environment)
    return Sandbox(mode, environment, lacks)


def _try(folder: Path, environment: Iterable[str]) -> dict[str, str]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            os.write(writer, json.dumps(_lacks(folder, environment)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        answer = said.read()
    os.waitpid(pid, 0)
    if not answer:
        return dict.fromkeys(layers.LAYERS, "a process that tried it has died")
    return cast("dict[str, str]", json.loads(answer))


def _lacks(folder: Path, environment: Iterable[str]) -> dict[str, str]:
    machine = platform.machine()
    found: dict[str, str] = {}
    asked: dict[str, Callable[[], str]] = {
        layers.NAMESPACES: lambda: namespaces.missing(machine),
        layers.MOUNTS: lambda: mounts.missing(machine),
        layers.PRIVILEGES: privileges.missing,
        layers.FILES: landlock.missing,
        layers.SYSTEM_CALLS: lambda: seccomp.missing(machine),
    }
    for layer, enter_layer in _entrances(folder, environment, False, False, False).items():
        found[layer] = asked[layer]()
        if not found[layer]:
            try:
                enter_layer()
            except (OSError, KeyError) as e:
                found[layer] = f"it cannot be entered: {getattr(e, 'strerror', None) or e}"
    return found

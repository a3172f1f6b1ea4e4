"""The environment by which a process finds its lease, and the one of this process for its children."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from jupyter_gpupool.core.environment import LEASE, PYTHON
from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.gpus.mps import MPS_VARIABLES, mps_limits, mps_runs
from jupyter_gpupool.transport.specs import AttachSpec

from .direct import visible_devices
from .lease_holder import new_config, write_config

#: The folder with the commands that processes with a lease find on their PATH: nvidia-smi.
COMMANDS = Path(__file__).parents[1] / "bin"

#: The variables of CUDA that a direct connection sets.
_OF_CUDA = ("CUDA_VISIBLE_DEVICES", *MPS_VARIABLES)


def lease_variables(spec: AttachSpec, config: Path | str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what to add to ``environment`` so that a process with it uses the lease that ``config`` describes."""
    added = {LEASE: str(config)}
    if spec.mode == "direct":  # the machine's own nvidia-smi shows these GPUs
        added["CUDA_VISIBLE_DEVICES"] = visible_devices(spec)
        if mps_runs():
            added.update(mps_limits(spec.devices))
    else:
        folders = [f for f in environment.get("PATH", os.defpath).split(os.pathsep) if f != str(COMMANDS)]
        added["PATH"] = os.pathsep.join([str(COMMANDS), *folders])
        added[PYTHON] = sys.executable
    return added


def remove_commands(environment: MutableMapping[str, str]) -> None:
    """Take the folder of :data:`COMMANDS` off the PATH of a process that has no lease any more."""
    path = environment.get("PATH")
    if path is not None:
        environment["PATH"] = os.pathsep.join(f for f in path.split(os.pathsep) if f != str(COMMANDS))
    environment.pop(PYTHON, None)


class ChildrensLease:
    """Lets the children of this process use its lease: a file, readable by this user alone, that ``os.environ`` names.

    Every method may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._before = {name: os.environ.get(name) for name in _OF_CUDA}
        self._config: Path | None = None
        self._mode = ""
        self._over = False

    @property
    def config(self) -> Path | None:
        """The lease's file; None while there is none."""
        return self._config

    def offer(self, spec: AttachSpec) -> None:
        """Let children that start from now on use the lease, unless it was withdrawn. Raises PoolError."""
        with self._lock:
            if self._over:
                return
            try:
                config = new_config()
                write_config(config, spec)
            except OSError as e:
                raise PoolError(f"cannot write the file that describes the lease: {e.strerror}") from None
            self._config, self._mode = config, spec.mode
            os.environ.update(lease_variables(spec, config, os.environ))

    def resize(self, spec: AttachSpec) -> None:
        """Write new limits, for children that start from now on."""
        with self._lock:
            if self._config is not None:
                with contextlib.suppress(OSError):  # a full disk: children see the former limits
                    write_config(self._config, spec)

    def withdraw(self) -> None:
        """Take the lease away from children that start from now on. Harmless when called again, or in a fork."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._over = True
            config, self._config = self._config, None
            if config is None:
                return
            config.unlink(missing_ok=True)
            if os.environ.get(LEASE) != str(config):
                return  # the program has another lease now
            del os.environ[LEASE]
            remove_commands(os.environ)
            if self._mode == "direct":
                for name, value in self._before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value

"""Starts real workers, and runs JAX programs with a lease on them in processes of their own."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.jax.client import native
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec, WorkerSpec

pytest.importorskip("torch", reason="the data plane needs PyTorch")
pytest.importorskip("jax", reason="JAX is not installed")

NAME = "Tesla V100-PCIE-32GB (emulated)"
SECRET = "a secret that only this test knows"
PROGRAMS = Path(__file__).parent / "programs"

_warm = multiprocessing.get_context("forkserver")
_warm.set_forkserver_preload(["jupyter_gpupool.pytorch.worker.worker"])


def _serve(listener: socket.socket, spec: WorkerSpec) -> None:
    from jupyter_gpupool.engines.frameworks import FRAMEWORKS
    from jupyter_gpupool.pytorch.worker import worker

    os._exit(worker.serve(spec, listener, lambda usage: None, frameworks=FRAMEWORKS))


@dataclass
class Running:
    """A worker, and what a client needs to reach it."""

    process: Any
    spec: AttachSpec


@pytest.fixture(scope="session", autouse=True)
def library(project_root: Path) -> None:
    """The plugin's C part, which an installation compiles; skips where it cannot."""
    source = native.LIBRARY.with_name("handles.c")
    if not native.LIBRARY.is_file() or native.LIBRARY.stat().st_mtime < source.stat().st_mtime:
        hook = runpy.run_path(str(project_root / ".make/hatch_build.py"), run_name="hatch_build")
        if not hook["compile_library"](project_root):
            pytest.skip("the JAX plugin's C part is not built, because there is no C compiler")


@pytest.fixture(scope="module")
def start_worker() -> Iterator[Callable[..., Running]]:
    started: list[Any] = []

    def start(num_gpus: int = 1, memory_mib: int = 26008) -> Running:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(64)
            devices = tuple(DeviceSpec(i, f"GPU-{i}", NAME, memory_mib, 32510, True) for i in range(num_gpus))
            digest = hashlib.sha256(SECRET.encode()).hexdigest()
            spec = WorkerSpec("lease-of-a-test", digest, devices, attach_timeout_s=6000.0)
            process = _warm.Process(target=_serve, args=(listener, spec), daemon=True)
            process.start()
            started.append(process)
            port = listener.getsockname()[1]
        return Running(process, AttachSpec(spec.lease_id, "127.0.0.1", port, SECRET, devices, spec.ttl_s))

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def worker(start_worker: Callable[..., Running]) -> Running:
    """A worker with one slice."""
    return start_worker()


@dataclass
class Prepared:
    """What starts a program in a folder of its own."""

    command: list[str]
    environment: dict[str, str]
    folder: Path

    def run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command, env=self.environment, cwd=self.folder, capture_output=True, text=True
        )

    def start(self) -> subprocess.Popen[str]:
        """Start it, with pipes to its standard input and output."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.command, env=self.environment, cwd=self.folder, stdin=pipe, stdout=pipe, text=True
        )


@pytest.fixture(scope="module")
def prepare_program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Prepared]:
    """Prepare a program of programs/, or the text of one, with a lease; None: without a lease."""

    def prepare(program: str, spec: AttachSpec | None, *arguments: str, **environment: str) -> Prepared:
        where = tmp_path_factory.mktemp("program")
        # What an installation has; that of the sources may be older.
        about = where / "plugin" / "gpupool_plugin-0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: gpupool-plugin\nVersion: 0\n")
        (about / "entry_points.txt").write_text(
            "[jax_plugins]\ngpupool = jupyter_gpupool.jax.client.plugin\n"
        )
        file = PROGRAMS / program
        if not program.endswith(".py"):
            file = where / "program.py"
            file.write_text(program)
        known = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        path = [str(about.parent), str(Path(native.__file__).parents[3]), known.get("PYTHONPATH", "")]
        known["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        if spec is not None:
            (where / "lease.json").write_text(spec.to_json())
            known["GPUPOOL_LEASE"] = str(where / "lease.json")
        return Prepared([sys.executable, str(file), *arguments], {**known, **environment}, where)

    return prepare


@pytest.fixture(scope="module")
def run_program(
    prepare_program: Callable[..., Prepared],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program of programs/, or the text of one, with a lease on a worker; None: without a lease."""

    def run(
        program: str, worker: Running | None, *arguments: str, port: int | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        spec = None
        if worker is not None:
            spec = worker.spec if port is None else replace(worker.spec, port=port)
        return prepare_program(program, spec, *arguments, **environment).run()

    return run

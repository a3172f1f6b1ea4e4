"""Real kernels, each of its own process, and a pool of this user's that they find."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

from jupyter_gpupool.client import discovery
from jupyter_gpupool.client.http import PoolClient

from ..conftest import PATIENCE_S
from ..support.user_pool import UserPool

pytest.importorskip("torch", reason="slices are for PyTorch programs")

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def pool_of_module() -> Iterator[PoolClient]:
    """For tests that only ask and leave nothing behind."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="gpupool-notebook-") as home:
        for kind in ("DATA", "RUNTIME", "CONFIG"):
            os.environ[f"JUPYTER_{kind}_DIR"] = f"{home}/{kind}"
            os.mkdir(f"{home}/{kind}", 0o700)
        os.environ["IPYTHONDIR"] = f"{home}/ipython"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyter_gpupool",
                "server",
                "--port=0",
                "--emulate",
                "--LocalEngine.attach_timeout_s=60",
            ],
            stderr=subprocess.DEVNULL,
        )
        while (address := discovery.find()) is None:
            assert process.poll() is None, "the pool did not start"
            time.sleep(0.02)
        with PoolClient(address.url, address.token, timeout_s=PATIENCE_S) as client:
            yield client
        process.terminate()
        process.wait(300)
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def one_kernel(pool_of_module: PoolClient) -> Iterator[Kernel]:
    kernel = Kernel()
    kernel.run("%load_ext jupyter_gpupool")
    yield kernel
    kernel.stop()


@pytest.fixture
def pool(jupyter_home: Any, user_pool: UserPool) -> Iterator[PoolClient]:
    """A pool that this user runs already; every process of the test finds it. Without leases before and after."""
    with user_pool.publish() as client:
        yield client
    user_pool.end_leases()


class Kernel:
    """A kernel and what its cells say."""

    def __init__(self, **config: Any) -> None:
        self.manager = KernelManager(kernel_name="gpupool-python3" if config else "python3")
        if config:
            metadata = self.manager.kernel_spec.metadata
            metadata["kernel_provisioner"] = {"provisioner_name": "gpupool-provisioner", "config": config}
        self.manager.start_kernel()
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=300)

    def run(self, code: str) -> str:
        """Everything the cell shows; plain text where there is HTML too."""
        said: list[str] = []

        def hear(message: dict) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                said.append(content["text"])
            elif message["msg_type"] in ("execute_result", "display_data"):
                said.append(content["data"]["text/plain"] + "\n")
            elif message["msg_type"] == "error":
                said.append("\n".join(content["traceback"]))

        self.client.execute_interactive(code, timeout=300, output_hook=hear)
        return _ANSI.sub("", "".join(said)).strip()

    def start(self, code: str) -> str:
        return self.client.execute(code)

    def finish(self, started: str) -> None:
        """Return when that cell has ended, however it did."""
        while self.client.get_shell_msg(timeout=300)["parent_header"].get("msg_id") != started:
            pass

    def stop(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


@pytest.fixture(autouse=True)
def patient_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's start waits for its worker, however long PyTorch takes to import."""
    monkeypatch.setattr("jupyter_gpupool.jupyter.kernel_lease._OPTIONAL_WAIT_S", PATIENCE_S)


@pytest.fixture
def start_kernel(pool: PoolClient) -> Iterator[Callable[..., Kernel]]:
    """Without arguments a plain kernel with %gpupool; with some, one that the provisioner gives those slices."""
    started: list[Kernel] = []

    def start(**config: Any) -> Kernel:
        kernel = Kernel(**config)
        started.append(kernel)
        if not config:
            assert kernel.run("%load_ext jupyter_gpupool") == ""
        return kernel

    yield start
    for kernel in started:
        kernel.stop()


@pytest.fixture
def start_kernel_without_pool(jupyter_home: Any) -> Iterator[Callable[[], Kernel]]:
    started: list[Kernel] = []

    def start() -> Kernel:
        started.append(Kernel())
        return started[-1]

    yield start
    for kernel in started:
        kernel.stop()


@pytest.fixture(autouse=True)
def no_loop_left() -> Iterator[None]:
    yield
    asyncio.set_event_loop(None)

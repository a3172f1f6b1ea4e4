"""A kernel's slices: asked for at its start, kept through its restarts, given back with its end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client.manager import KernelManager
from jupyter_client.multikernelmanager import AsyncMultiKernelManager
from jupyter_core.paths import jupyter_runtime_dir
from tornado.web import HTTPError

from jupyter_gpupool.client import discovery
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.models import LeaseState
from jupyter_gpupool.jupyter import process_state
from jupyter_gpupool.jupyter.kernel_gpu_requests import parse, pending_requests
from jupyter_gpupool.jupyter.kernel_lease import KernelLease

from ..support.processes import runs

pytest.importorskip("torch", reason="workers need PyTorch")

DEVICES = "import torch; print(torch.cuda.device_count(), torch.ones(3, device='cuda').sum().item())"


class Kernel:
    """A kernel and a client of it, as notebooks have them."""

    def __init__(self, name: str, **launch: Any) -> None:
        self.manager = KernelManager(kernel_name=name)
        self.manager.start_kernel(**launch)
        self._connect()

    def _connect(self) -> None:
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=300)

    def run(self, code: str) -> str:
        """What the code prints; the words of its error where there is one."""
        said: list[str] = []

        def note(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream" and content["name"] == "stdout":
                said.append(content["text"])
            elif message["msg_type"] == "error":
                said.append(f"{content['ename']}: {content['evalue']}")

        self.client.execute_interactive(code, timeout=300, output_hook=note)
        return "".join(said).strip()

    def restart(self, **how: Any) -> None:
        self.client.stop_channels()
        self.manager.restart_kernel(**how)
        self._connect()

    @property
    def pid(self) -> int:
        return self.manager.provisioner.pid  # type: ignore[union-attr]

    def end(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel()


@pytest.fixture
def start(kernelspec: Callable[..., str]) -> Iterator[Callable[..., Kernel]]:
    started: list[Kernel] = []

    def start_kernel(launch: dict[str, Any] | None = None, **config: Any) -> Kernel:
        name = kernelspec(f"wish-{len(started)}", **config) if config else kernelspec()
        kernel = Kernel(name, **(launch or {}))
        started.append(kernel)
        return kernel

    yield start_kernel
    for kernel in started:
        if kernel.manager.has_kernel:
            kernel.end()
        kernel.manager.cleanup_resources()


def only(pool: PoolClient) -> Any:
    (lease,) = pool.leases()
    return lease


def test_a_kernel_has_its_slice_from_start_to_shutdown(
    pool: PoolClient, start: Callable[..., Kernel]
) -> None:
    kernel = start()
    lease = only(pool)
    assert lease.state is LeaseState.ACTIVE
    assert lease.request.partial == 0.5
    file = Path(kernel.run("import os; print(os.environ['GPUPOOL_LEASE'])"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert kernel.run(DEVICES) == "1 3.0"
    smi = "import subprocess; print(subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True).stdout)"
    assert lease.slices[0].gpu_uuid in kernel.run(smi)
    kernel.end()
    assert pool.lease(lease.id).state is LeaseState.RELEASED
    assert not runs(lease.worker.pid)
    assert not file.exists()


@pytest.mark.parametrize("now", [False, True], ids=["restart", "restart now"])
def test_the_lease_outlives_restarts_and_interrupts(
    pool: PoolClient, start: Callable[..., Kernel], now: bool
) -> None:
    kernel = start()
    before = only(pool)
    kernel.manager.interrupt_kernel()
    kernel.run("import torch; x = torch.ones(1000, device='cuda')")
    kernel.restart(now=now)
    after = only(pool)
    assert (after.id, after.worker.pid) == (before.id, before.worker.pid)
    assert kernel.run("print('x' in globals())") == "False"
    assert kernel.run(DEVICES) == "1 3.0"


def test_a_kernel_that_died_is_started_again_with_its_lease(
    pool: PoolClient, start: Callable[..., Kernel], eventually: Callable[..., Any]
) -> None:
    kernel = start()
    before = only(pool)
    os.kill(kernel.pid, signal.SIGKILL)
    eventually(lambda: not kernel.manager.is_alive(), "the kernel is dead")
    kernel.restart(now=True)  # what a restarter does
    assert only(pool).id == before.id
    assert kernel.run(DEVICES) == "1 3.0"


async def one_that_died(pool: PoolClient, name: str) -> tuple[AsyncMultiKernelManager, Any]:
    """Among the kernels of a server, one that was killed and whose lease was given back."""
    kernels = AsyncMultiKernelManager(connection_dir=jupyter_runtime_dir())
    manager = kernels.get_kernel(await kernels.start_kernel(kernel_name=name))
    os.kill(manager.provisioner.pid, signal.SIGKILL)  # type: ignore[union-attr]
    while pool.leases():
        await asyncio.sleep(0.02)
    return kernels, manager


@pytest.mark.parametrize("when", ["before it asks", "while it asks"])
def test_a_kernel_that_is_shut_down_while_its_restarter_is_at_it_stays_ended(
    pool: PoolClient, kernelspec: Callable[..., str], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Jupyter's restarter hears nothing of the end, and starts a kernel that nobody knows any more."""
    asks, may_ask, begin = threading.Event(), threading.Event(), KernelLease.begin

    def begin_in_its_time(self: KernelLease) -> None:
        asks.set()
        assert may_ask.wait(300)
        begin(self)

    async def storm() -> None:
        kernels, manager = await one_that_died(pool, kernelspec("restless", num_gpus=1, grace_s=0.0))
        if when == "while it asks":
            monkeypatch.setattr(KernelLease, "begin", begin_in_its_time)
            restart = asyncio.ensure_future(manager.restart_kernel(now=True))
            await asyncio.to_thread(asks.wait, 300)
            await manager.shutdown_kernel(now=True)
            may_ask.set()
        else:
            await kernels.shutdown_kernel(manager.kernel_id)
            restart = asyncio.ensure_future(manager.start_kernel(**manager._launch_args))
        with pytest.raises((RuntimeError, asyncio.InvalidStateError)) as refused:
            await restart
        why = str(refused.value.__context__ or refused.value)
        assert re.search("was shut down (meanwhile|while its request waited)", why)
        assert not manager.has_kernel

    asyncio.run(storm())
    assert pool.leases() == []


def test_a_kernel_that_is_restarted_twice_at_once_is_one_kernel_with_one_lease(
    pool: PoolClient, kernelspec: Callable[..., str]
) -> None:
    """By its user and by its restarter, which does not know of the other."""

    async def storm() -> None:
        kernels, manager = await one_that_died(pool, kernelspec("restless", num_gpus=1, grace_s=0.0))
        both = manager.restart_kernel(now=True), manager.restart_kernel(now=True)
        await asyncio.gather(*both, return_exceptions=True)  # jupyter_client trips over its own state
        assert len(pool.leases()) == 1
        kernel = f"kernel-{manager.kernel_id}.json"
        named = [
            p.pid for p in psutil.process_iter(["cmdline"]) if kernel in " ".join(p.info["cmdline"] or [])
        ]
        assert named == [manager.provisioner.pid]
        await manager.shutdown_kernel(now=True)

    asyncio.run(storm())
    assert pool.leases() == []


def test_a_dead_kernel_that_nobody_starts_again_gives_its_lease_back(
    pool: PoolClient, start: Callable[..., Kernel], eventually: Callable[..., Any]
) -> None:
    kernel = start(num_gpus=1, partial=0.5, grace_s=0.1)
    os.kill(kernel.pid, signal.SIGKILL)
    eventually(lambda: not pool.leases(), "the lease is given back")
    # The user may start it again all the same, and it asks for the same again.
    kernel.restart(now=True)
    assert only(pool).request.partial == 0.5


def test_a_busy_pool_holds_up_no_kernel(
    pool: PoolClient, start: Callable[..., Kernel], eventually: Callable[..., Any]
) -> None:
    first = start(num_gpus=1)
    second = start(num_gpus=1, partial=0.25)
    waiting = next(lease for lease in pool.leases() if lease.state is LeaseState.QUEUED)
    said = json.loads(second.run("import json, os; print(json.dumps(dict(os.environ)))"))
    assert "GPUPOOL_LEASE" not in said
    assert said["GPUPOOL_PENDING_LEASE"] == waiting.id
    assert waiting.position == 1
    file = Path(said["GPUPOOL_PENDING"])
    assert not file.exists()
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    first.end()
    eventually(file.exists, "the lease's file is there as soon as it is granted")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text())["lease_id"] == waiting.id
    second.restart()
    assert only(pool).id == waiting.id
    assert second.run(DEVICES) == "1 3.0"


def test_who_waits_can_be_taken_out_of_the_queue(
    pool: PoolClient, start: Callable[..., Kernel], eventually: Callable[..., Any]
) -> None:
    start(num_gpus=1)
    second = start(num_gpus=1)
    waiting = next(lease for lease in pool.leases() if lease.state is LeaseState.QUEUED)
    pool.release(waiting.id)
    assert second.run("print('alive')") == "alive"
    second.end()
    assert len(pool.leases()) == 1
    assert pool.lease(waiting.id).state is LeaseState.CANCELLED


def test_a_kernel_that_ends_while_it_waits_leaves_the_queue(
    pool: PoolClient, start: Callable[..., Kernel]
) -> None:
    start(num_gpus=1)
    second = start(num_gpus=1)
    assert len(pool.leases()) == 2
    second.end()
    assert len(pool.leases()) == 1


def test_require_refuses_the_start_in_one_line(pool: PoolClient, start: Callable[..., Kernel]) -> None:
    start(num_gpus=1)
    with pytest.raises(HTTPError) as refused:
        start(num_gpus=1, require=True)
    assert refused.value.status_code == 503
    assert "cannot be granted now" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(pool.leases()) == 1


@pytest.mark.parametrize(
    ("wish", "status", "words"),
    [
        ({"num_gpus": 9}, 422, "9"),
        ({"num_gpus": 1, "partial": 1.5}, 400, "1.5"),
        ({"num_gpus": 1, "partial": 0.5, "memory_mib": 100}, 400, "both"),
        ({"num_gpus": -1}, 400, "-1"),
        ({"num_gpus": "two"}, 400, "num_gpus is a str"),
        ({"num_gpus": True}, 400, "num_gpus is a bool"),
        ({"gpus": 2}, 400, "unknown field 'gpus'"),
        ({"num_gpus": 1, "filters": {"colour": "red"}}, 400, "colour"),
        ({"num_gpus": 1, "filters": ["V100"]}, 400, "filters is a list"),
        ({"num_gpus": 1, "grace_s": "soon"}, 400, "grace_s"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_nonsense_in_a_kernelspec_is_one_line_and_no_lease(
    pool: PoolClient, start: Callable[..., Kernel], wish: dict[str, Any], status: int, words: str
) -> None:
    with pytest.raises(HTTPError) as refused:
        start(**wish)
    assert refused.value.status_code == status
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not pool.leases(include_ended=True)


class TestWhereAWishIsFound:
    """First what was stored for the kernel's id, then the notebook, then the kernelspec."""

    @staticmethod
    def notebook(folder: Path, metadata: Any) -> dict[str, Any]:
        """Arguments of a start for a new notebook, as Jupyter Server gives them."""
        path = folder / "work.ipynb"
        path.write_text(json.dumps({"cells": [], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
        return {"env": {**os.environ, "JPY_SESSION_NAME": str(path)}}

    def test_the_notebook_before_the_kernelspec(
        self, pool: PoolClient, start: Callable[..., Kernel], tmp_path: Path
    ) -> None:
        start(self.notebook(tmp_path, {"gpupool": {"num_gpus": 1, "partial": 0.25}}))
        lease = only(pool)
        assert lease.request.partial == 0.25
        assert lease.request.label == "work.ipynb"

    def test_a_notebook_may_want_none(
        self, pool: PoolClient, start: Callable[..., Kernel], tmp_path: Path
    ) -> None:
        start(self.notebook(tmp_path, {"gpupool": {"num_gpus": 0}}))
        assert not pool.leases(include_ended=True)

    @pytest.mark.parametrize("wish", ["two", [2], {"num_gpus": [2]}, {"partial": "half"}], ids=json.dumps)
    def test_nonsense_in_a_notebook_is_one_line_and_no_lease(
        self, pool: PoolClient, start: Callable[..., Kernel], tmp_path: Path, wish: Any
    ) -> None:
        with pytest.raises(HTTPError) as refused:
            start(self.notebook(tmp_path, {"gpupool": wish}))
        assert "work.ipynb" in str(refused.value)
        assert "\n" not in str(refused.value)
        assert refused.value.status_code == 400
        assert not pool.leases(include_ended=True)

    def test_a_notebook_that_is_none_asks_for_nothing_of_its_own(
        self, pool: PoolClient, start: Callable[..., Kernel], tmp_path: Path
    ) -> None:
        launch = self.notebook(tmp_path, {})
        (tmp_path / "work.ipynb").write_text("[" * 100_000)
        start(launch)
        assert only(pool).request.partial == 0.5

    def test_what_was_stored_for_the_kernel_before_all(
        self, pool: PoolClient, start: Callable[..., Kernel], tmp_path: Path
    ) -> None:
        pending_requests.put("b1f5c2f0-0d57-4a4b-9f55-7b6b2c1f7a01", parse({"memory_mib": 1024}, "the test"))
        launch = self.notebook(tmp_path, {"gpupool": {"num_gpus": 1, "partial": 0.25}})
        kernel = start({"kernel_id": "b1f5c2f0-0d57-4a4b-9f55-7b6b2c1f7a01", **launch})
        assert only(pool).request.memory_mib == 1024
        kernel.restart()
        assert only(pool).request.memory_mib == 1024


def test_no_wish_no_pool(start: Callable[..., Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    # Whoever asked for a pool here would be told that this is no address of one.
    monkeypatch.setenv("GPUPOOL_URL", "nowhere")
    kernel = start(num_gpus=0)
    assert kernel.run("print(1 + 1)") == "2"


def test_a_pool_that_is_away_holds_up_no_kernel(
    start: Callable[..., Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUPOOL_URL", "http://127.0.0.1:9")
    kernel = start(num_gpus=1)
    said = kernel.run("import os; print(os.environ['GPUPOOL_REFUSED'])")
    assert "no GPU pool answers at http://127.0.0.1:9" in said
    with pytest.raises(HTTPError) as refused:
        start(num_gpus=1, require=True)
    assert refused.value.status_code == 503


def test_a_server_that_shuts_down_starts_no_kernel_and_no_pool(kernelspec: Callable[..., str]) -> None:
    async def start() -> None:
        kernels = AsyncMultiKernelManager(connection_dir=jupyter_runtime_dir())
        process_state.closing.add(kernels)
        with pytest.raises(RuntimeError, match="its server was shut down"):
            await kernels.start_kernel(kernel_name=kernelspec())

    asyncio.run(start())
    assert discovery.find() is None


def test_a_start_that_fails_leaves_no_lease(
    pool: PoolClient, kernelspec: Callable[..., str], jupyter_home: Path
) -> None:
    name = kernelspec()
    file = jupyter_home / "data" / "kernels" / name / "kernel.json"
    spec = json.loads(file.read_text())
    spec["argv"][0] = "/no/such/program"
    file.write_text(json.dumps(spec))
    with pytest.raises(FileNotFoundError):
        Kernel(name)
    (lease,) = pool.leases(include_ended=True)
    assert lease.state is LeaseState.RELEASED


def test_the_default_provisioner_gives_any_kernel_what_its_notebook_asks_for(
    pool: PoolClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jupyter_client.provisioning import KernelProvisionerFactory

    launch = TestWhereAWishIsFound.notebook(tmp_path, {"gpupool": {"num_gpus": 1, "partial": 0.5}})
    factory = KernelProvisionerFactory.instance()
    monkeypatch.setattr(factory, "default_provisioner_name", "gpupool-provisioner")
    kernel = Kernel("python3", **launch)
    try:
        assert only(pool).state is LeaseState.ACTIVE
        assert kernel.run(DEVICES) == "1 3.0"
    finally:
        kernel.end()

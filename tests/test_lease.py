"""`jupyter_gpupool.attach()`: what a notebook or a script gets without knowing anything."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import jupyter_gpupool
from jupyter_gpupool.client import discovery
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.errors import (
    ImpossibleRequest,
    InvalidRequest,
    NoCapacity,
    PoolError,
    PoolUnreachable,
    SliceInUse,
)
from jupyter_gpupool.core.models import Lease, LeaseState
from jupyter_gpupool.lease import AlreadyAttached

from .support.processes import runs
from .support.user_pool import UserPool

torch = pytest.importorskip("torch", reason="leases are for PyTorch programs")


@pytest.fixture
def pool(jupyter_home: Any, user_pool: UserPool) -> Iterator[PoolClient]:
    """A pool that this user runs already; every process of the test finds it. Without leases before and after."""
    with user_pool.publish() as client:
        yield client
    user_pool.end_leases()


def granted(pool: PoolClient) -> list[int]:
    return [gpu["granted_mib"] for server in pool.pool()["servers"] for gpu in server["gpus"]]


def test_two_gpus_at_eighty_percent(pool: PoolClient) -> None:
    with jupyter_gpupool.attach(num_gpus=2, partial=0.8, spread=True) as lease:
        assert lease.devices == ("gpupool:0", "gpupool:1")
        assert [device.limit_mib for device in lease.slices] == [26008, 26008] == granted(pool)
        assert torch.cuda.is_available() and torch.cuda.device_count() == 2
        x = torch.arange(6.0, device=torch.device("gpupool:1")).view(2, 3)
        y = x.to("cuda:1") @ torch.ones(3, 2, device=torch.device("cuda:1"))
        assert y.tolist() == [[3.0, 3.0], [12.0, 12.0]] and y.device.index == 1
        assert "emulated" in repr(lease) and lease.state is LeaseState.ACTIVE
    assert granted(pool) == [0, 0] and not torch.cuda.is_available()
    assert lease.state is LeaseState.RELEASED
    lease.release()  # once more is harmless


def test_beyond_the_slice_is_out_of_memory_with_the_sizes_and_the_lease_goes_on(pool: PoolClient) -> None:
    with jupyter_gpupool.attach(memory_mib=100):
        kept = torch.ones(10 << 20, device="cuda")  # 40 MiB
        with pytest.raises(
            torch.OutOfMemoryError, match=r"Tried to allocate 80\.00 MiB.*100\.00 MiB.*40\.00 MiB"
        ):
            torch.empty(20 << 20, device="cuda")
        assert kept.sum().item() == 10 << 20
        del kept
        assert torch.ones(20 << 20, device="cuda").sum().item() == 20 << 20


def test_a_lease_is_resized_where_it_is(pool: PoolClient) -> None:
    with jupyter_gpupool.attach(memory_mib=100) as lease:
        kept = torch.ones(10 << 20, device="cuda")  # 40 MiB
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(20 << 20, device="cuda")
        lease.resize(memory_mib=200)
        assert granted(pool) == [200, 0] and lease.slices[0].limit_mib == 200
        assert torch.cuda.mem_get_info() == (160 << 20, 200 << 20)
        assert torch.cuda.get_device_properties(0).total_memory == 200 << 20
        more = torch.ones(20 << 20, device="cuda")
        for too_little in (100, 1):
            with pytest.raises(
                SliceInUse, match="cuda:0 has 120 MiB in use and cannot be made smaller"
            ) as refused:
                lease.resize(memory_mib=too_little)
            assert "\n" not in str(refused.value)
        with pytest.raises(SliceInUse, match="has 120 MiB in use"):
            pool.resize(lease.id, memory_mib=50)  # the worker says so too
        with pytest.raises(ImpossibleRequest):
            lease.resize(memory_mib=99999)
        assert granted(pool) == [200, 0]
        del more
        lease.resize(memory_mib=50)
        assert granted(pool) == [50, 0] and kept.sum().item() == 10 << 20
        with pytest.raises(torch.OutOfMemoryError, match=r"50\.00 MiB"):
            torch.empty(20 << 20, device="cuda")
        lease.resize(0.5)
        assert granted(pool) == [16255, 0]


def test_a_lease_that_somebody_else_resizes(pool: PoolClient, eventually: Callable[..., Any]) -> None:
    with jupyter_gpupool.attach(memory_mib=100) as lease:
        assert torch.ones(2, device="cuda").sum().item() == 2
        pool.resize(lease.id, memory_mib=300)
        eventually(lambda: lease.slices[0].limit_mib == 300, "a heartbeat has brought the news")
        eventually(lambda: torch.cuda.mem_get_info()[1] == 300 << 20, "and PyTorch knows")


def test_an_answer_from_before_a_resize_does_not_undo_it(
    pool: PoolClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with jupyter_gpupool.attach(memory_mib=100) as lease:
        holder = lease._holder
        assert holder is not None
        ask = holder._client.lease

        def late(lease_id: str) -> Lease:
            answer = ask(lease_id)
            lease.resize(memory_mib=200)
            return answer

        monkeypatch.setattr(holder._client, "lease", late)
        located = holder._locate()
        assert located is not None and located.devices[0].limit_mib == 200
        assert [device.limit_mib for device in lease.slices] == [200]
        assert torch.cuda.mem_get_info()[1] == 200 << 20


def test_a_pool_is_started_for_it_and_ends_with_it(eventually: Callable[..., Any]) -> None:
    with jupyter_gpupool.attach(partial=0.1):
        address = discovery.find()
        assert address is not None
        assert torch.ones(3, device="cuda").sum().item() == 3
        descendants = psutil.Process(address.pid).children(recursive=True)
        assert descendants, "a worker computes"
    program = (
        "import jupyter_gpupool, os, psutil; lease = jupyter_gpupool.attach(partial=0.1); "
        "from jupyter_gpupool.client import discovery; print(discovery.find().pid, flush=True); os._exit(0)"
    )
    environment = {**os.environ, "JUPYTER_RUNTIME_DIR": os.environ["JUPYTER_RUNTIME_DIR"] + "/other"}
    environment["JUPYTER_DATA_DIR"] = environment["JUPYTER_RUNTIME_DIR"]
    pid = int(subprocess.run([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE).stdout)
    eventually(lambda: not runs(pid), "the pool that was started for a process ends with it")


def ends_with(child: subprocess.Popen[str]) -> str:
    """What a child prints once it may go on."""
    out, err = child.communicate("go on\n", timeout=300)
    return (out + err).strip()


def test_children_use_the_lease_until_it_ends(pool: PoolClient, eventually: Callable[..., Any]) -> None:
    program = "import torch; print(torch.cuda.device_count(), torch.cuda.is_available() and torch.ones(2).cuda().sum())"

    def child(program: str) -> subprocess.Popen[str]:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen([sys.executable, "-c", program], text=True, **pipes)

    before = dict(os.environ)
    with jupyter_gpupool.attach(partial=0.25) as lease:
        path = Path(os.environ["GPUPOOL_LEASE"])
        assert path.stat().st_mode & 0o777 == 0o600
        assert ends_with(child(program)) == "1 tensor(2., device='cuda:0')"
        shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        assert shown.stdout == f"GPU 0: {lease.slices[0].name} (UUID: {lease.slices[0].uuid})\n", shown.stderr
        lease.resize(memory_mib=500)
        used = f"import torch; x = torch.ones(2).cuda(); print('ready', flush=True); input(); {program}"
        uses = child(used)
        assert uses.stdout is not None and uses.stdout.readline() == "ready\n"
        starts = child(f"input(); {program}")
    assert dict(os.environ) == before
    assert not path.exists()
    assert "GPU worker of this lease is gone" in ends_with(uses)
    assert "the lease has probably been released. Unset GPUPOOL_LEASE" in ends_with(starts)
    assert ends_with(child(program)) == "0 False"
    lease = jupyter_gpupool.attach(partial=0.25)
    (known,) = pool.leases()
    assert known.worker is not None
    os.kill(known.worker.pid, signal.SIGKILL)
    eventually(lambda: dict(os.environ) == before, "a lost lease is taken away")


def test_one_lease_at_a_time(pool: PoolClient) -> None:
    with jupyter_gpupool.attach(partial=0.5) as lease:
        with pytest.raises(AlreadyAttached, match=f"holds lease {lease.id} already; call its release"):
            jupyter_gpupool.attach()
        assert granted(pool) == [16255, 0]
    with jupyter_gpupool.attach(partial=0.25):
        assert granted(pool) == [8127, 0]


def test_former_names_of_arguments_keep_working(pool: PoolClient) -> None:
    seen: list[LeaseState] = []
    with (
        pytest.warns(DeprecationWarning, match="is now attach") as warned,
        jupyter_gpupool.attach(
            partial=0.25, mode="remote", news=lambda lease: seen.append(lease.state)
        ) as lease,
    ):
        assert granted(pool) == [8127, 0] and lease.spec.mode == "remote"
        lease.resize(partial=0.5)
        assert granted(pool) == [16255, 0]
    assert [str(warning.message) for warning in warned] == [
        "attach(mode=) is now attach(connection=)",
        "attach(news=) is now attach(on_update=)",
    ]
    assert all(warning.filename == __file__ for warning in warned), "the line to change is the caller's"
    assert seen[-1] is LeaseState.ACTIVE


def test_the_public_names_are_the_modules_own() -> None:
    for name in jupyter_gpupool.__all__:
        assert getattr(jupyter_gpupool, name) is not None
    assert jupyter_gpupool.NoCapacity is NoCapacity and jupyter_gpupool.PoolError is PoolError
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        jupyter_gpupool.Nothing  # noqa: B018
    assert set(jupyter_gpupool.__all__) <= set(dir(jupyter_gpupool))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_gpus": 0}, "number of GPUs must be 1 or more, not 0"),
    ({"num_gpus": 9}, "9 GPUs"),
    ({"partial": 0}, "above 0 and at most 1, not 0"),
    ({"partial": 1.5}, "above 0 and at most 1, not 1.5"),
    ({"partial": 0.5, "memory_mib": 10}, "memory"),
    ({"filters": {"colour": "red"}}, "colour"),
    ({"connection": "magic"}, "magic"),
    ({"memory_fraction": 0.5, "partial": 0.5}, "either memory_fraction or its alias partial, not both"),
    ({"filters": ["name"]}, "names with values"),
    ({"timeout": "soon"}, "seconds from 0 up, not 'soon'"),
]


def test_bad_requests_are_refused_in_one_line(pool: PoolClient) -> None:
    for asked, reason in REFUSED:
        with pytest.raises(PoolError, match=reason) as refused:
            jupyter_gpupool.attach(**asked)
        assert "\n" not in str(refused.value)
    assert granted(pool) == [0, 0] and not pool.pool()["queue"]


def test_without_waiting_and_with_a_limit(pool: PoolClient) -> None:
    def take_all(ready: Any, end: Any) -> None:
        with jupyter_gpupool.attach(2):
            ready.set()
            end.wait(300)

    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=take_all, args=(ready, end))
    other.start()
    assert ready.wait(300)
    with pytest.raises(NoCapacity):
        jupyter_gpupool.attach(wait=False)
    with pytest.raises(NoCapacity, match="no GPUs within 0.2 s: position 1 in the queue"):
        jupyter_gpupool.attach(timeout=0.2)
    assert not pool.pool()["queue"], "who gave up waiting is out of the queue"
    end.set()
    other.join(300)
    assert other.exitcode == 0 and granted(pool) == [0, 0]


def test_an_unreachable_pool() -> None:
    with pytest.raises(PoolUnreachable, match="http://127.0.0.1:9"):
        jupyter_gpupool.attach(url="http://127.0.0.1:9")
    with pytest.raises((PoolUnreachable, InvalidRequest), match="no address"):
        jupyter_gpupool.attach(url="not a url")


def test_a_killed_worker_is_a_clear_error_and_the_next_attach_works(
    pool: PoolClient, eventually: Callable[..., Any]
) -> None:
    lease = jupyter_gpupool.attach(partial=0.5)
    x = torch.ones(3, device="cuda")
    (known,) = pool.leases()
    assert known.worker is not None
    os.kill(known.worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="GPU worker of this lease is gone"):
        while True:
            x = x + 1
            x.sum().item()
    eventually(lambda: lease.state is LeaseState.LOST, "the pool knows that the lease is lost")
    with jupyter_gpupool.attach(partial=0.5):
        assert torch.ones(3, device="cuda").sum().item() == 3


def test_a_process_that_ends_anyhow_gives_its_lease_back(
    pool: PoolClient, eventually: Callable[..., Any]
) -> None:
    for end in ("sys.exit(3)", "raise ValueError('no')", "os._exit(4)", "os.kill(os.getpid(), 9)"):
        program = (
            "import os, sys, jupyter_gpupool; lease = jupyter_gpupool.attach(2, 0.5); "
            f"print(os.environ['GPUPOOL_LEASE'], flush=True); {end}"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        path = Path(done.stdout.strip())
        assert done.returncode != 0
        eventually(lambda: granted(pool) == [0, 0], f"free after {end}")
        eventually(lambda: not path.exists(), f"no secret is left after {end}")  # noqa: B023


def test_a_process_with_a_lease_from_its_environment_does_not_take_another(
    pool: PoolClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUPOOL_LEASE", "/nowhere")
    with pytest.raises(AlreadyAttached, match="GPUPOOL_LEASE"), contextlib.closing(pool):
        jupyter_gpupool.attach()

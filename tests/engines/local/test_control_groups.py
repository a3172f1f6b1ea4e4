"""Workers in control groups: where the service may make them, and what the kernel does with them then."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="workers need PyTorch")

from jupyter_gpupool.engines.local.bounds import bounds, control_groups  # noqa: E402
from jupyter_gpupool.engines.local.bounds.control_groups import (  # noqa: E402
    ControlGroups,
    NotDelegated,
    delegated,
)
from jupyter_gpupool.engines.local.bounds.limits import Limits  # noqa: E402

from ...support import hostile_operator  # noqa: E402
from .test_bounds import (  # noqa: E402
    MANY_PROCESSES,
    MEMORY_MIB,
    TASKS,
    THREADS,
    Bounded,
    attached,
    ends,
    importable,  # noqa: F401
    tried,
)
from .test_engine import alive, granted  # noqa: E402


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the kernel shows of a service that has its own part of the tree; plain files, so nothing is bounded."""
    service = tmp_path / "system.slice" / "gpupool.service"
    (service / "pool").mkdir(parents=True)
    for group in (service, service / "pool"):
        (group / "cgroup.controllers").write_text("cpu memory pids")
        (group / "cgroup.subtree_control").write_text("")
        (group / "cgroup.procs").write_text("")
        (group / "cgroup.type").write_text("domain")
    return tmp_path


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    write = control_groups._write
    monkeypatch.setattr(control_groups, "_write", lambda file, text: (found.append(text), write(file, text)))
    return found


def seen_from(tree: Path, group: str, kind: str = "cgroup2") -> Path:
    proc = tree / "proc"
    proc.mkdir(exist_ok=True)
    (proc / "mountinfo").write_text(f"30 25 0:27 / {tree} rw,nosuid shared:4 - {kind} cgroup2 rw\n")
    (proc / "cgroup").write_text(f"0::{group}\n")
    return proc


def delegate(group: Path) -> None:
    try:
        os.setxattr(group, "user.delegate", b"1")
    except OSError as e:
        pytest.skip(f"files have no attributes here: {e.strerror}")


def test_a_service_that_has_a_part_of_the_tree_divides_it(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = written(monkeypatch)
    service = tree / "system.slice" / "gpupool.service"
    delegate(service)
    groups = delegated(seen_from(tree, "/system.slice/gpupool.service/pool"))
    assert groups.parent == service
    assert orders == ["+memory +pids", "+cpu"]


@pytest.mark.parametrize(
    ("group", "marked", "lacking", "why"),
    [
        ("/system.slice/gpupool.service/pool", "", "", "Delegate="),
        ("/system.slice/gpupool.service", "system.slice/gpupool.service", "", "DelegateSubgroup="),
        ("/system.slice/gpupool.service/pool", "system.slice/gpupool.service", "memory", "memory cannot"),
        ("/../other", "", "", "not visible"),
    ],
)
def test_a_service_that_cannot_divide_it_says_why(
    group: str, marked: str, lacking: str, why: str, tree: Path
) -> None:
    if marked:
        delegate(tree / marked)
        (tree / marked / "cgroup.controllers").write_text("cpu pids" if lacking else "cpu memory pids")
    with pytest.raises(NotDelegated, match=why):
        delegated(seen_from(tree, group))
    with pytest.raises(NotDelegated, match="version 2"):
        delegated(seen_from(tree, group, kind="cgroup"))


def test_a_group_is_removed_as_soon_as_its_processes_have_ended(
    tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    """A folder with something in it stands for a group whose processes free their memory."""
    groups = ControlGroups(tmp_path / "groups")

    async def main() -> None:
        kept = bounds.Bounds(
            str(tmp_path),
            host_memory_mib=None,
            disk_mib=0,
            workers=dict,
            lent_mib=lambda lease_id: 0,
            log=logging.getLogger(),
            groups=groups,
        )
        for lease_id in ("ended", "a former pool's", "live"):
            (groups.path(lease_id) / "process").mkdir(parents=True)
        kept.ended("ended")
        kept.settle({"live"})
        assert sorted(groups.lease_ids()) == ["a former pool's", "ended", "live"]
        for lease_id in ("ended", "a former pool's"):
            (groups.path(lease_id) / "process").rmdir()
        while len(groups.lease_ids()) > 1:
            await asyncio.sleep(0.01)
        assert groups.lease_ids() == ["live"]
        await kept.stop()

    asyncio.run(main())


# -- in a kernel that has them


@pytest.fixture
def real_groups(request: pytest.FixtureRequest) -> ControlGroups:
    try:
        return delegated()
    except NotDelegated as e:
        shows = request.node.name.removeprefix("test_").replace("_", " ")
        pytest.skip(f"not shown: {shows}; control groups: {e}")


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel alone, without the watch."""
    monkeypatch.setattr(bounds, "INTERVAL_S", 1e6)


@contextlib.contextmanager
def running(folder: Path, **options: Any) -> Iterator[Bounded]:
    server = Bounded(folder, **options)
    try:
        yield server
    finally:
        server.stop()


def members(group: Path) -> list[int]:
    return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]


def kept(group: Path) -> dict[str, str]:
    """The limits that the kernel keeps of a group."""
    names = ("memory.max", "memory.oom.group", "memory.swap.max", "pids.max", "cpu.weight")
    return {name: (group / name).read_text().strip() for name in names if (group / name).exists()}


def of_limits(limits: Limits, group: Path) -> dict[str, str]:
    expected = {
        "memory.max": str(limits.memory_mib << 20),
        "memory.oom.group": "1",
        "memory.swap.max": "0",
        "pids.max": str(limits.tasks),
        "cpu.weight": str(limits.weight),
    }
    return {name: value for name, value in expected.items() if (group / name).exists()}


def test_a_worker_is_in_a_group_of_its_own_whose_limits_follow_its_slices(
    real_groups: ControlGroups, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    with running(tmp_path / "run") as server:
        with attached(server, memory_mib=100) as lease:
            pid = server.engine._workers.addresses()[lease.id].pid
            group = real_groups.path(lease.id)
            assert members(group) == [pid]
            small = server.engine._bounds._limits[lease.id]
            assert {"memory.max", "pids.max"} <= kept(group).keys()
            assert kept(group) == of_limits(small, group)
            server.do(server.engine.limit_worker(lease.id, {"GPU-x": 700}))
            large = server.engine._bounds._limits[lease.id]
            assert large.weight > small.weight
            assert kept(group) == of_limits(large, group)
        eventually(lambda: not group.exists(), "its group is removed")


def test_the_kernel_ends_a_worker_that_takes_more_memory_than_its_group_has(
    real_groups: ControlGroups, tmp_path: Path, eventually: Callable[..., Any], unwatched: None
) -> None:
    with running(tmp_path / "run", host_memory_mib=MEMORY_MIB) as server:
        other = granted()
        worker = server.start(other)
        with attached(server) as lease:
            reason = ends(server, lease, MANY_PROCESSES, eventually)
        assert f"more than the {MEMORY_MIB} MiB of the GPU server's host memory" in reason
        eventually(lambda: not real_groups.path(lease.id).exists(), "its group is removed")
        assert server.engine._workers.addresses()[other.id] == worker, "another worker ended, too"


def test_a_worker_that_ends_because_all_together_take_too_much_is_not_said_to_have_done_so(
    real_groups: ControlGroups,
    tmp_path: Path,
    eventually: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    unwatched: None,
) -> None:
    machine = real_groups.parent / "gpupool-test-machine"
    machine.mkdir()
    try:
        (machine / "cgroup.subtree_control").write_text("+memory +pids")
        (machine / "memory.max").write_text(str(MEMORY_MIB // 2 << 20))
        (machine / "memory.swap.max").write_text("0")
        monkeypatch.setattr(bounds, "delegated", lambda: ControlGroups(machine))
        with running(tmp_path / "run", host_memory_mib=MEMORY_MIB) as server, attached(server) as lease:
            reason = ends(server, lease, MANY_PROCESSES, eventually)
            assert "host memory was used up" in reason
    finally:
        eventually(lambda: removed(machine), "all that was in it has ended")


def removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def test_a_worker_cannot_start_more_than_its_group_may_have_and_its_program_goes_on(
    real_groups: ControlGroups, tmp_path: Path, unwatched: None
) -> None:
    with running(tmp_path / "run") as server, attached(server) as lease:
        limits = server.engine._bounds._limits[lease.id]
        real_groups.change(lease.id, replace(limits, tasks=TASKS))
        assert "can't start new thread" in tried(THREADS)
        assert torch.ones(3, device="cuda").sum().item() == 3
        assert lease.id not in server.reasons


def test_what_a_worker_started_ends_with_it_though_it_has_left_its_process_group(
    real_groups: ControlGroups, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    with running(tmp_path / "run", sandbox="off") as server:
        with attached(server) as lease:
            started = hostile_operator.run(
                "import os, time\nanswer = os.fork()\n"
                "if not answer:\n    os.setsid()\n    time.sleep(600)\n    os._exit(0)"
            )
            eventually(lambda: os.getsid(started) == started, "it has left")
            os.kill(server.engine._workers.addresses()[lease.id].pid, signal.SIGKILL)
            eventually(lambda: lease.id in server.reasons, "the lease ends")
            eventually(lambda: not alive(started), "what it has started ends")
        eventually(lambda: not real_groups.path(lease.id).exists(), "its group is removed")


def test_workers_stay_in_their_groups_when_their_pool_starts_again(
    real_groups: ControlGroups, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    with running(tmp_path / "run", persistent=True, host_memory_mib=2000) as server:
        lease = granted()
        worker = server.start(lease)
    former = real_groups.path("of a lease that ended meanwhile")
    former.mkdir()
    with running(tmp_path / "run", persistent=True, host_memory_mib=MEMORY_MIB) as server:
        group = real_groups.path(lease.id)
        assert server.do(server.engine.adopt([lease])) == {lease.id: worker}
        assert members(group) == [worker.pid]
        assert kept(group)["memory.max"] == str(MEMORY_MIB << 20)
        assert not former.exists()
        server.do(server.engine.stop_worker(lease.id))
        eventually(lambda: not group.exists(), "its group is removed")


#: Twice, because a pool starts again in the group that it has moved its own processes to.
IN_A_CONTAINER = """
from pathlib import Path
from jupyter_gpupool.engines.local.bounds.control_groups import delegated
from jupyter_gpupool.engines.local.bounds.limits import Limits
for _ in range(2):
    groups = delegated()
    group = groups.make("lease", Limits(memory_mib=100))
    print(group, (group / "memory.max").read_text().strip(), Path("/proc/self/cgroup").read_text().strip())
    assert groups.end("lease")
"""


def test_a_container_that_may_write_its_groups_is_divided(
    real_groups: ControlGroups, eventually: Callable[..., Any]
) -> None:
    container = real_groups.parent / "gpupool-test-container"
    container.mkdir()
    mounted = 'umount /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec "$0" -c "$1"'
    inside = (
        f'echo 0 > {container}/cgroup.procs && exec unshare --cgroup --mount sh -c \'{mounted}\' "$0" "$1"'
    )
    try:
        done = subprocess.run(
            ["sh", "-c", inside, sys.executable, IN_A_CONTAINER], capture_output=True, text=True, check=False
        )
        if "unshare failed" in done.stderr:
            pytest.skip(f"not shown: a container that may write its groups is divided; {done.stderr.strip()}")
        assert (
            done.stdout.splitlines() == [f"/sys/fs/cgroup/gpupool-worker-lease {100 << 20} 0::/gpupool"] * 2
        ), done.stderr
    finally:
        eventually(lambda: removed(container / "gpupool") and removed(container), "nobody is left in it")

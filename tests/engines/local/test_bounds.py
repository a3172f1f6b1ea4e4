"""What a worker may take of its machine: a worker that was taken over, against each bound and without it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="workers need PyTorch")

from jupyter_gpupool.core.models import Lease, LeaseState  # noqa: E402
from jupyter_gpupool.engines.local.bounds import bounds, control_groups, measure  # noqa: E402
from jupyter_gpupool.engines.local.bounds.limits import (  # noqa: E402
    MAX_DEPTH,
    MAX_FILES,
    Limits,
    Taken,
    excess,
    limits_of,
)
from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.transport.lifeline import Lifeline  # noqa: E402
from jupyter_gpupool.transport.specs import DeviceSpec  # noqa: E402

from ...support import hostile_operator  # noqa: E402
from .test_engine import attach_spec, granted  # noqa: E402
from .test_parking import Server  # noqa: E402
from .test_sandbox import OPERATORS  # noqa: E402

MEMORY_MIB, DISK_MIB, TASKS = 1500, 64, 60


class Bounded(Server):
    """An engine whose workers have small bounds, and which remembers why they ended."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.reasons: dict[str, tuple[LeaseState, str]] = {}
        super().__init__(folder, operators=OPERATORS, **options)
        said = self.engine._workers.on_exit

        def ended(lease_id: str, state: LeaseState, reason: str) -> None:
            self.reasons[lease_id] = state, reason
            said(lease_id, state, reason)

        self.engine._workers.on_exit = ended

    def watched(self, lease: Lease, **other: Any) -> None:
        """Let the watch alone keep other limits than the worker has set itself."""
        of = self.engine._bounds._limits
        of[lease.id] = replace(of[lease.id], **other)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))


def not_delegated() -> None:
    raise control_groups.NotDelegated("these workers are bounded without")


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bounded]:
    """One without control groups, which would hold a worker before the watch does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "delegated", not_delegated)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
        server = Bounded(
            tmp_path_factory.mktemp("server") / "run", host_memory_mib=MEMORY_MIB, worker_disk_mib=DISK_MIB
        )
        yield server
        server.stop()


@contextlib.contextmanager
def attached(server: Bounded, memory_mib: int = 4000) -> Iterator[Lease]:
    lease = granted(memory_mib=memory_mib)
    spec = attach_spec(lease, server.start(lease))
    line = Lifeline(spec)
    session.activate(spec)
    try:
        yield lease
    finally:
        session.deactivate()
        line.release()
        server.do(server.engine.stop_worker(lease.id))


@pytest.fixture
def lease(one_server: Bounded) -> Iterator[Lease]:
    with attached(one_server) as lease:
        yield lease


def tried(code: str) -> str:
    """What comes of this Python in the worker; empty: it succeeded."""
    compile(code, "attempt", "exec")  # a mistake of this test's own would look like a refusal
    return str(
        hostile_operator.run(
            f"import os, resource, sys, threading, time\nanswer = ''\ntry: exec({code!r})\n"
            "except BaseException as e: answer = f'{type(e).__name__}: {e}'"
        )
    )


NO_END = "\ntime.sleep(600)"


def ends(server: Bounded, lease: Lease, code: str, eventually: Callable[..., Any]) -> str:
    """The reason with which the lease ends while its worker does that, and waits."""
    with contextlib.suppress(RuntimeError):  # the client's end of it
        pytest.fail(f"it went on: {tried(code + NO_END)}")
    eventually(lambda: lease.id in server.reasons, "the worker is ended")
    state, reason = server.reasons[lease.id]
    assert state is LeaseState.LOST
    return reason


# -- host memory


def test_an_operator_that_finds_no_host_memory_says_so_and_the_program_goes_on(
    one_server: Bounded, lease: Lease
) -> None:
    kept = torch.ones(1000, device="cuda")
    with pytest.raises(torch.OutOfMemoryError, match=f"host memory.*{MEMORY_MIB} MiB"):
        torch.ones(2000 << 18, device="cuda").sum().item()  # it fits into the slice of 4000 MiB
    assert kept.sum().item() == 1000
    assert lease.id not in one_server.reasons


def test_a_process_allocates_no_more_than_its_own_limit_which_it_cannot_raise(lease: Lease) -> None:
    assert tried(f"x = bytearray({MEMORY_MIB + 500} << 20)").startswith("MemoryError")
    raised = tried("resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)")
    assert raised.startswith(("ValueError", "PermissionError"))


#: A worker in its sandbox starts no program, but it can have processes.
FORK = """
def fork(do):
    pid = os.fork()
    if not pid:
        try: do()
        finally: os._exit(0)
    return pid
"""
#: Each process keeps to its own limit; together they do not.
MANY_PROCESSES = f"""{FORK}
said, say = os.pipe()
over, go_on = os.pipe()
def keep():
    os.close(go_on)
    x = bytearray({MEMORY_MIB // 3} << 20)
    x[::4096] = b'x' * len(x[::4096])
    os.write(say, b'1')
    os.read(over, 1)
started = [fork(keep) for _ in range(4)]
assert [os.read(said, 1) for _ in started] == [b'1'] * 4
"""
#: In memory that no process maps.
FILES_IN_MEMORY = f"""
kept = []
for _ in range({MEMORY_MIB // DISK_MIB + 4}):
    kept.append(os.memfd_create('x'))
    for _ in range({DISK_MIB - 1}): os.write(kept[-1], b'x' * (1 << 20))
"""


@pytest.mark.parametrize("code", [MANY_PROCESSES, FILES_IN_MEMORY], ids=["processes", "files in memory"])
def test_memory_that_no_limit_of_a_process_bounds_is_found_by_the_watch(
    code: str, one_server: Bounded, lease: Lease, eventually: Callable[..., Any]
) -> None:
    other = granted()
    worker = one_server.start(other)
    reason = ends(one_server, lease, code, eventually)
    assert f"more than the {MEMORY_MIB} MiB of the GPU server's host memory" in reason
    assert one_server.engine._workers.addresses()[other.id] == worker, "another worker ended, too"
    one_server.do(one_server.engine.stop_worker(other.id))


def test_without_the_watch_nothing_else_holds_it(one_server: Bounded, lease: Lease) -> None:
    one_server.watched(lease, memory_mib=0)
    assert tried(MANY_PROCESSES + "os.close(go_on)\n[os.waitpid(pid, 0) for pid in started]") == ""


# -- processes

THREADS = (
    f"[threading.Thread(target=time.sleep, args=(600,), daemon=True).start() for _ in range({TASKS + 20})]"
)
FORKS = f"{FORK}\nfor _ in range({TASKS + 20}): fork(lambda: time.sleep(600))"


@pytest.mark.parametrize("code", [THREADS, FORKS], ids=["threads", "processes"])
def test_who_starts_too_many_is_ended_with_all_that_it_has_started(
    code: str, one_server: Bounded, lease: Lease, eventually: Callable[..., Any]
) -> None:
    pid = one_server.engine._workers.addresses()[lease.id].pid
    one_server.watched(lease, tasks=TASKS, memory_mib=0)
    assert f"where {TASKS} are allowed" in ends(one_server, lease, code, eventually)
    eventually(lambda: not measure.members([pid])[pid], "all its processes are gone")


def test_a_bomb_of_forks_does_not_outrun_its_end(
    one_server: Bounded, lease: Lease, eventually: Callable[..., Any]
) -> None:
    pid = one_server.engine._workers.addresses()[lease.id].pid
    one_server.watched(lease, tasks=TASKS, memory_mib=0)
    # A tree of 127 processes: enough, and no more than the machine bears.
    bomb = (
        f"{FORK}\ndef bomb(depth):\n    for _ in range(2 if depth else 0): fork(lambda: bomb(depth - 1))\n"
        "    time.sleep(600)\nfork(lambda: bomb(6))"
    )
    reason = ends(one_server, lease, bomb, eventually)
    assert f"where {TASKS} are allowed" in reason
    eventually(lambda: not measure.members([pid])[pid], "all its processes are gone")


# -- disk

OWN = 'os.environ["TMPDIR"]'


def test_one_file_can_be_no_larger_than_the_workers_disk(lease: Lease) -> None:
    too_large = f"f = open({OWN} + '/x', 'wb', 0)\nfor _ in range({DISK_MIB + 1}): f.write(bytes(1 << 20))"
    assert "File too large" in tried(too_large)


MANY_FILES = f"""
for k in range(4):
    with open(f'{{{OWN}}}/{{k}}', 'wb') as f: f.write(bytes({DISK_MIB // 2} << 20))
"""
DELETED_FILES = f"""
kept = []
for k in range(4):
    kept.append(open(f'{{{OWN}}}/{{k}}', 'wb', 0))
    os.unlink(kept[-1].name)
    kept[-1].write(bytes({DISK_MIB // 2} << 20))
"""


@pytest.mark.parametrize("code", [MANY_FILES, DELETED_FILES], ids=["many", "deleted, and still open"])
def test_files_that_are_too_large_together_end_their_worker(
    code: str, one_server: Bounded, lease: Lease, eventually: Callable[..., Any]
) -> None:
    assert f"more than the {DISK_MIB} MiB" in ends(one_server, lease, code, eventually)


def test_without_the_watch_files_have_no_limit_together(one_server: Bounded, lease: Lease) -> None:
    one_server.watched(lease, disk_mib=0)
    assert tried(MANY_FILES) == ""


@pytest.mark.parametrize("shape", ["wide", "deep", "closed"])
def test_a_directory_that_is_hard_to_measure_counts_as_too_large(shape: str, tmp_path: Path) -> None:
    if shape == "wide":
        for k in range(600):
            (tmp_path / str(k)).mkdir()
    elif shape == "deep":
        at = tmp_path
        for _ in range(MAX_DEPTH + 2):
            at = at / "d"
            at.mkdir()
    else:
        (tmp_path / "d").mkdir(mode=0)
        if os.geteuid() == 0:
            pytest.skip("not shown: a folder that is closed counts as too large; root reads every folder")
    limits = Limits(disk_mib=1000)
    assert "files on the GPU server's disk" in excess(limits, measure.with_directory(Taken(), tmp_path))


def test_a_directory_is_measured_with_all_that_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_bytes(bytes(3 << 20))
    (tmp_path / "link").symlink_to("/usr")  # which is not followed
    found = measure.with_directory(Taken(disk_bytes=1 << 20), tmp_path)
    assert 4 << 20 <= found.disk_bytes < 5 << 20
    assert (found.files, found.depth) == (4, 3)
    assert measure.with_directory(Taken(), tmp_path / "none") == Taken()
    assert found.files < MAX_FILES


def test_a_deleted_file_counts_in_a_union_of_disks_too(tmp_path: Path) -> None:
    """There files and folders may have disks with other numbers; a folder on another disk stands for that."""
    folder, state = Path("/proc"), tmp_path / "lease.json"
    state.touch()
    with open(tmp_path / "x", "wb", 0) as f:
        f.write(bytes(3 << 20))
        os.unlink(f.name)
        assert measure.taken([os.getpid()], folder, state).disk_bytes >= 3 << 20
        assert measure.taken([os.getpid()], folder, folder).disk_bytes == 0


# -- how much


def device(limit_mib: int, total_mib: int = 30000, emulated: bool = True) -> DeviceSpec:
    return DeviceSpec(0, "GPU-x", "one", limit_mib, total_mib, emulated)


@pytest.mark.parametrize(
    ("devices", "machine_mib", "wanted", "memory_mib", "data_mib", "weight"),
    [
        ([device(3000)], 200_000, None, 10_096, 64_096, 10),
        ([device(30000), device(15000)], 200_000, None, 94_096, 124_096, 150),
        ([device(30000)], 20_000, None, 18_000, 64_096, 100),  # no worker takes the whole machine
        ([device(3000)], 200_000, 5000, 5000, 5000, 10),
        ([device(30)], 200_000, 0, 0, 0, 1),
        ([device(30000, emulated=False)], 200_000, None, 64_096, 0, 100),
    ],
)
def test_the_limits_follow_the_slices(
    devices: list[DeviceSpec],
    machine_mib: int,
    wanted: int | None,
    memory_mib: int,
    data_mib: int,
    weight: int,
) -> None:
    found = limits_of(devices, machine_mib, wanted, 7)
    assert (found.memory_mib, found.data_mib, found.weight, found.disk_mib) == (
        memory_mib,
        data_mib,
        weight,
        7,
    )


def test_a_larger_slice_may_take_more_at_once(tmp_path: Path) -> None:
    server = Bounded(tmp_path / "run")
    try:
        with attached(server, 1000) as lease:
            before = server.engine._bounds._limits[lease.id].memory_mib
            server.do(server.engine.limit_worker(lease.id, {"GPU-x": 2000}))
            assert server.engine._bounds._limits[lease.id].memory_mib == before + 2000
        assert lease.id not in server.engine._bounds._limits
    finally:
        server.stop()

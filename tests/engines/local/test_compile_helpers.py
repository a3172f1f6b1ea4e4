"""Workers that may start no program have their graphs compiled: by whom, and what these can reach and be told."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

torch = pytest.importorskip("torch", reason="workers need PyTorch")

from jupyter_gpupool.engines.local import compile_helpers, worker_files  # noqa: E402
from jupyter_gpupool.engines.local.sandbox import sandbox  # noqa: E402
from jupyter_gpupool.engines.local.sandbox.layers import SYSTEM_CALLS  # noqa: E402
from jupyter_gpupool.pytorch.client.compile.graphs import states  # noqa: E402

from .test_engine import alive, attach_spec, granted  # noqa: E402
from .test_parking import Server  # noqa: E402
from .test_sandbox import OPERATORS, attached, tried  # noqa: E402


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))


@contextlib.contextmanager
def started(tmp_path: Path) -> Iterator[Server]:
    if why := sandbox.prepare("auto", tmp_path).lacks[SYSTEM_CALLS]:
        pytest.skip(why)
    server = Server(tmp_path / "run", operators=OPERATORS)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with started(tmp_path) as server:
        yield server


def layers(x: Any, weight: Any) -> Any:
    for _ in range(10):
        x = torch.relu(x * 1.01 + 0.1) * 0.5 + x
    return x @ weight


def once_done(eventually: Callable[..., Any], *inputs: Any) -> tuple[Callable[..., Any], list[str]]:
    """The function of the layers, after enough calls; and what has come of compiling it."""
    fast = torch.compile(layers, backend="gpupool", options={"inductor": True})
    for _ in range(4):
        fast(*inputs)
    eventually(lambda: states() != ["compiling"], "it is compiled, or is not", 600)
    return fast, states()


def helpers_of(pid: int) -> list[psutil.Process]:
    """The other processes of a worker's process group that have its parent."""
    parent = psutil.Process(pid).ppid()
    return [p for p in psutil.Process(parent).children() if p.pid != pid and os.getpgid(p.pid) == pid]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for the CPU")
def test_a_graph_is_compiled_though_its_worker_can_start_no_program(
    server: Server, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    lease = granted()
    worker = server.start(lease)
    with attached(attach_spec(lease, worker)):
        inputs = torch.randn(1024, 256, device="cuda"), torch.randn(256, 4, device="cuda")
        fast, said = once_done(eventually, *inputs)
        assert said == ["compiled"]
        torch.testing.assert_close(fast(*inputs).cpu(), layers(*(x.cpu() for x in inputs)))
        (helper,) = helpers_of(worker.pid)
        made = worker_files.compile_directory(worker_files.path(str(tmp_path / "run"), lease.id))
        assert made.is_dir()
        refused = tried(
            starts_a_compiler="import subprocess; subprocess.run(['g++', '--version'])",
            starts_itself="os.execv('/bin/true', ['true'])",
            sees_the_helpers_files=f"os.listdir({str(made)!r})",
            signals_the_helper=f"os.kill({helper.pid}, 0)",
        )
        assert all(refused.values()), refused
    eventually(lambda: not alive(worker.pid) and not alive(helper.pid), "both end with the lease")
    eventually(lambda: not list((tmp_path / "run").glob(f"*{lease.id}*")), "nothing is left")


def test_operators_run_one_by_one_where_the_helper_dies(
    tmp_path: Path, eventually: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with started(tmp_path) as server:  # within the test, for its log to be captured
        lease = granted()
        worker = server.start(lease)
        with attached(attach_spec(lease, worker)):
            inputs = torch.randn(8, 4, device="cuda"), torch.randn(4, 4, device="cuda")
            fast = torch.compile(layers, backend="gpupool", options={"inductor": True})
            for _ in range(3):
                fast(*inputs)
            torch.cuda.synchronize()
            eventually(lambda: helpers_of(worker.pid), "the helper is there")
            os.kill(helpers_of(worker.pid)[0].pid, signal.SIGKILL)
            fast, said = once_done(eventually, *inputs)
            assert said and all("the compile helper" in state for state in said)
            torch.testing.assert_close(fast(*inputs).cpu(), layers(*(x.cpu() for x in inputs)))
            assert not helpers_of(worker.pid), "it is not started again"
    assert capfd.readouterr().err.count("its operators run one by one") == 1


ATTEMPTS = {
    "start a compiler": "import subprocess; assert not subprocess.run([sys.executable, '-S', '-c', '']).returncode",
    "read a file of the pool": "open(secret)",
    "write where a worker does": "open(worker + '/x', 'w')",
    "connect": "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "signal its parent": "os.kill(os.getppid(), 0)",
    "leave its group": "os.setsid()",
}


def test_what_a_helper_can_reach(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text("everybody's leases")
    (own := tmp_path / "own").mkdir()
    (worker := tmp_path / "worker").mkdir()
    lacks = {layer: why for layer, why in sandbox.prepare("auto", own).lacks.items() if why}
    if lacks:
        pytest.skip(f"{lacks}")
    code = (
        "import os, sys, threading\nfrom pathlib import Path\n"
        "from jupyter_gpupool.engines.local.sandbox import sandbox\n"
        f"secret, worker, own = {str(tmp_path / 'ledger')!r}, {str(worker)!r}, {str(own)!r}\n"
        "sandbox.prepare('auto', Path(own)).enter(Path(own), False, with_programs=True)\n"
        "os.chmod(own, 0o777)\n"
        f"for name, attempt in {ATTEMPTS!r}.items():\n"
        "    try: exec(attempt)\n"
        "    except OSError as e: print(name)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert found.stdout.splitlines() == [name for name in ATTEMPTS if name != "start a compiler"], (
        found.stderr
    )
    assert own.stat().st_mode & 0o777 != 0o777, "compilers only believe that they change modes"


def test_a_worker_whose_sandbox_is_off_has_no_helper(tmp_path: Path) -> None:
    assert not sandbox.Sandbox("off").refuses_programs(real=False)
    held = dict.fromkeys(sandbox.prepare("auto", tmp_path).lacks, "")
    assert sandbox.Sandbox("auto", (), held).refuses_programs(real=False)
    assert sandbox.Sandbox("require", (), held).refuses_programs(real=True)
    assert not sandbox.Sandbox("auto", (), held).refuses_programs(real=True)


def test_urgent_bytes_do_not_hold_up_who_starts_workers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They make a socket readable, and there is nothing to read."""
    ours, theirs = socket.socketpair()
    lease = SimpleNamespace(lease_id="a")
    helpers = compile_helpers.CompileHelpers(str(tmp_path))
    helpers.add(ours, 1, lease, {})  # type: ignore[arg-type]
    with theirs:
        theirs.send(b"x", socket.MSG_OOB)
        helpers.start(ours, sandbox.Sandbox("off"), lambda: None)
    assert not list(helpers.sockets())
    assert "lease a compiles nothing" in capfd.readouterr().err


def test_no_worker_has_an_end_of_anothers_pair(server: Server, eventually: Callable[..., Any]) -> None:
    """It could answer for the other one's helper."""
    leases = [granted(), granted()]
    one, other = (server.start(lease).pid for lease in leases)
    parent = psutil.Process(one).ppid()
    # A worker lets go of its parent's first of all.
    eventually(
        lambda: not (sockets_of(one) | sockets_of(other)) & sockets_of(parent), "their parent's are gone"
    )
    assert not sockets_of(one) & sockets_of(other) and len(sockets_of(parent)) > 2


def sockets_of(pid: int) -> set[str]:
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # it is closed meanwhile
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return {where for where in found if where.startswith("socket:")} - sockets_of_us()


def sockets_of_us() -> set[str]:
    return {os.readlink(f"/proc/self/fd/{s}") for s in (1, 2)}

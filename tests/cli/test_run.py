"""`gpupool run`: its log, its exit code, signals, terminals; and what is left of it when it is killed."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from ..conftest import PATIENCE_S
from ..support.ports import free_ports

#: Counts the signals that it gets until it has been quiet; says so when it is ready.
COUNTER = """
import signal, sys, time
got = []
for name in sys.argv[1:]:
    signal.signal(getattr(signal, name), lambda n, _: got.append(signal.Signals(n).name))
print("ready", flush=True)
deadline = time.monotonic() + 300
while not got and time.monotonic() < deadline:
    time.sleep(0.02)
time.sleep(0.5)
print("got", *got, flush=True)
sys.exit(5)
"""

STAMP = r"\[INFO\] \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def test_the_log_that_bitfusions_users_know(gpupool: Callable[..., Any], jupyter_home: Path) -> None:
    """The whole story with a pool that is started for it; the command's words in between are its own."""
    done = gpupool("run", "-n", 2, "-p", 0.8, "--", "sh", "-c", "echo from the command >&2; echo result")
    assert done.returncode == 0 and done.stdout == "result\n"
    lines = [
        STAMP + r"No GPU pool is running; starting one.*",
        STAMP + rf"Query server (?P<host>127\.0\.0\.1):(?P<port>\d+) to claim client id: (?P<id>{UUID})",
        STAMP + r"Query server (?P=host):(?P=port) gpu availability",
        STAMP + r"Query server health status",
        STAMP + r"Choosing GPUs from server list \[(?P=host):(?P=port)\]",
        STAMP
        + r"Requesting GPUs \[0 1\] with 26008 MiB of memory from server 0, with version (?P<v>[\w.+]+)\.\.\.",
        rf"(?:{STAMP}Waiting for the GPU server to start the worker\n)*Requested resources:",
        r"Server List: (?P=host):(?P=port)",
        r"Client idle timeout: 0 min",
        STAMP
        + r"Locked 2 GPUs with partial memory 0\.8, configuration saved to '(?P<config>/.*/gpupool\w+)'",
        STAMP + r"2 of these GPUs are emulated.*",
        STAMP + r"Running client command 'sh -c '.*'' on 2 GPUs, with the following servers:",
        STAMP + r"(?P=host) \d+ (?P=id) (?P=port) (?P=v)",
        r"from the command",
        STAMP + r"Releasing GPUs from config file '(?P=config)'\.\.\.",
        STAMP + r"Released GPUs on 1 servers and removed generated config file '(?P=config)'",
    ]
    story = re.fullmatch("\n".join(lines) + "\n", done.stderr)
    assert story, done.stderr
    assert not Path(story["config"]).exists()


def test_a_pool_that_was_started_for_a_command_ends_with_it(
    gpupool: Callable[..., Any], marked: Callable[[], list], tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    assert gpupool("run", "--", "true", MARK=str(tmp_path)).returncode == 0
    eventually(lambda: not marked(), "no process is left")


@pytest.mark.parametrize(
    ("script", "code"), [("exit 7", 7), ("kill -KILL $$", 137), ("kill -TERM $$", 143), ("true", 0)]
)
def test_the_exit_code_is_the_commands(
    gpupool: Callable[..., Any], pool: Any, script: str, code: int
) -> None:
    assert gpupool("run", "-p", "0.1", "sh", "-c", script).returncode == code
    assert pool.idle() and pool.granted() == [0, 0]


def test_it_waits_for_a_pool_that_is_down_only_if_it_is_told_to(
    gpupool: Callable[..., Any],
    start: Callable[..., Any],
    eventually: Callable[..., Any],
    last_line: Callable[[Any], str],
    pool: Any,
    tmp_path: Path,
) -> None:
    (port,) = free_ports(1)
    away = {"GPUPOOL_URL": f"http://127.0.0.1:{port}"}
    assert "no GPU pool answers" in last_line(gpupool("run", "-p", "0.1", "--", "true", **away))
    running = start("run", "--wait-for-pool", "-p", "0.1", "--", "echo", "trained", **away)
    interrupted = start("run", "--wait-for-pool", "--", "echo", "trained", **away)
    for one in (running, interrupted):
        eventually(lambda one=one: "Waiting for the pool: no GPU pool answers" in one.log, "that it waits")
    interrupted.process.terminate()
    assert interrupted.wait() == 143 and interrupted.out == ""
    assert running.process.poll() is None
    with forwarded(port, pool.address.url):
        assert running.wait() == 0, running.log
    assert running.out == "trained\n" and pool.idle()
    refused = gpupool("run", "--wait-for-pool", "-n", "99", "--", "true")
    assert refused.returncode == 1 and "Waiting for the pool" not in refused.stderr


@contextlib.contextmanager
def forwarded(port: int, url: str) -> Iterator[None]:
    """What comes to the port goes to that address: the pool is there from now on."""
    to = urlsplit(url)

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(to.hostname, to.port)
        await asyncio.gather(pipe(reader, there[1]), pipe(there[0], writer))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(accept, "127.0.0.1", port))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_pipes_reach_the_command(gpupool: Callable[..., Any], pool: Any) -> None:
    done = gpupool("run", "--", "sed", "s/a/b/", stdin="banana\n" * 20000)
    assert done.returncode == 0 and done.stdout == "bbnana\n" * 20000


def test_options_behind_the_command_are_its_own(gpupool: Callable[..., Any], pool: Any) -> None:
    done = gpupool("run", "-p", "0.1", "echo", "-n", "2", "--", "--help")
    assert done.stdout == "2 -- --help"


def test_what_the_command_finds(gpupool: Callable[..., Any], pool: Any) -> None:
    """The environment's defaults, and a configuration that only its user can read."""
    show = (
        "import json, os; path = os.environ['GPUPOOL_LEASE']; content = json.load(open(path)); "
        "print(json.dumps([os.stat(path).st_mode, [d['limit_mib'] for d in content['devices']], content['mode']]))"
    )
    done = gpupool("run", "--", sys.executable, "-c", show, NUM_GPUS="2", PARTIAL_GPU="0.8")
    mode, limits, attachment = json.loads(done.stdout)
    assert stat.S_IMODE(mode) == 0o600 and limits == [26008, 26008] and attachment == "remote"
    assert "secret" not in done.stderr
    done = gpupool("run", "-m", 4096, "--", sys.executable, "-c", show, NUM_GPUS="2", PARTIAL_GPU="0.8")
    assert json.loads(done.stdout)[1] == [4096, 4096]
    assert "Locked 2 GPUs with 4096 MiB of memory, configuration saved to" in done.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1"])
def test_signals_are_handed_on(
    start: Callable[..., Any], eventually: Callable[..., Any], pool: Any, name: str
) -> None:
    running = start("run", "--", sys.executable, "-c", COUNTER, name)
    eventually(lambda: "ready" in running.out, "the command runs")
    running.process.send_signal(getattr(signal, name))
    assert running.wait() == 5
    assert running.out.splitlines()[-1] == f"got {name}"
    assert "Released GPUs" in running.log and pool.idle()


def test_a_command_that_does_not_handle_a_signal_ends_by_it(
    start: Callable[..., Any], eventually: Callable[..., Any], pool: Any
) -> None:
    running = start("run", "--", "sh", "-c", "echo ready; exec sleep 600")
    eventually(lambda: "ready" in running.out, "the command runs")
    running.process.terminate()
    assert running.wait() == 143 and "Released GPUs" in running.log


class Terminal:
    """A process with a terminal of its own, and what the terminal shows."""

    def __init__(self, *command: str) -> None:
        self.master, slave = pty.openpty()

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_gpupool", *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=take_terminal,
        )
        os.close(slave)
        self.shown = ""

    def read_until(self, text: str) -> None:
        while text not in self.shown:
            ready, _, _ = select.select([self.master], [], [], PATIENCE_S)
            assert ready, f"{text!r} does not come: {self.shown}"
            try:
                self.shown += os.read(self.master, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"ended without {text!r}: {self.shown}") from None

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(self.master, 4096):
                pass
        os.close(self.master)


def test_ctrl_c_at_a_terminal_reaches_the_command_once(pool: Any) -> None:
    program = f"import os; assert os.isatty(0) and os.isatty(1) and os.isatty(2)\n{COUNTER}"
    terminal = Terminal("run", "--", sys.executable, "-c", program, "SIGINT")
    terminal.read_until("ready\r\n")  # its output, not its text in the log
    terminal.type("\x03")
    terminal.read_until("Released GPUs")
    assert re.search(r"^(\^C)?got SIGINT\r?$", terminal.shown, re.M), terminal.shown
    terminal.close()
    assert terminal.process.wait(300) == 5


def test_a_signal_to_the_group_reaches_the_command_once(pool: Any) -> None:
    # A group of its own below the shell, without a terminal, as of a test runner or a batch system.
    program = [sys.executable, "-m", "jupyter_gpupool", "run", "--", sys.executable, "-c", COUNTER]
    process = subprocess.Popen(
        [*program, "SIGINT", "SIGUSR1"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.read() == "got SIGINT\n" and process.wait(300) == 5


def test_two_halves_share_a_gpu_and_a_third_waits_its_turn(
    start: Callable[..., Any], eventually: Callable[..., Any], pool: Any
) -> None:
    holding = ("--filter", "index=0", "--", "sh", "-c", "echo runs; read x")
    first, second = start("run", "-p", "0.5", *holding), start("run", "-p", "0.5", *holding)
    for half in (first, second):
        eventually(lambda: "runs" in half.out, "a half runs")  # noqa: B023
    assert pool.granted() == [32510, 0]

    third = start("run", "-p", "0.3", *holding)
    eventually(lambda: "Waiting for GPUs: position 1 in the queue" in third.log, "the third waits")
    fourth = start("run", "-p", "0.3", *holding)
    eventually(lambda: "Waiting for GPUs: position 2 in the queue" in fourth.log, "the fourth waits")
    assert "runs" not in third.out

    fourth.process.send_signal(signal.SIGINT)
    assert fourth.wait() == 130 and "runs" not in fourth.out
    assert len(pool.client.pool()["queue"]) == 1

    first.close_stdin()
    assert first.wait() == 1  # what `read` says at the end of its input
    eventually(lambda: "runs" in third.out, "the third runs")
    assert pool.granted() == [16255 + 9753, 0]


def test_ctrl_c_at_a_terminal_while_waiting(
    start: Callable[..., Any], eventually: Callable[..., Any], pool: Any
) -> None:
    holding = start("run", "-n", 2, "--", "sh", "-c", "echo runs; read x")
    eventually(lambda: "runs" in holding.out, "all GPUs are taken")
    terminal = Terminal("run", "--", "echo", "it", "ran")
    terminal.read_until("Waiting for GPUs: position 1 in the queue")
    terminal.type("\x03")
    assert terminal.process.wait(300) == 130
    terminal.close()
    assert not pool.client.pool()["queue"]


def test_no_wait(
    gpupool: Callable[..., Any],
    start: Callable[..., Any],
    last_line: Callable[..., str],
    eventually: Callable[..., Any],
    pool: Any,
) -> None:
    holding = start("run", "-n", 2, "--", "sh", "-c", "echo runs; read x")
    eventually(lambda: "runs" in holding.out, "all GPUs are taken")
    done = gpupool("run", "--no-wait", "--", "echo", "it ran")
    assert done.returncode == 1 and done.stdout == ""
    assert "cannot be granted now" in last_line(done)


@pytest.mark.parametrize("victim", ["run", "keeper"])
def test_kill_9_leaves_nothing(
    start: Callable[..., Any],
    marked: Callable[[], list[psutil.Process]],
    eventually: Callable[..., Any],
    pool: Any,
    tmp_path: Path,
    victim: str,
) -> None:
    """Grandchildren, loaders of data and the configuration file included."""
    train = f"{sys.executable} -m jupyter_gpupool.examples.mnist --epochs 1000 --num-workers 2; true"
    running = start("run", "-p", "0.5", "--", "sh", "-c", train, MARK=str(tmp_path))
    eventually(lambda: "Train Epoch" in running.out, "it trains")
    config = Path(re.search(r"saved to '(.*)'", running.log)[1])  # type: ignore[index]
    assert len(marked()) >= 4 and config.exists()
    if victim == "run":
        running.kill()
    else:
        psutil.Process(running.process.pid).children()[0].kill()
        assert running.wait() == 137
    eventually(pool.idle, "the share is free")
    eventually(lambda: not marked(), "no process is left")
    eventually(lambda: not config.exists(), "the configuration file is gone")


def test_kill_9_while_waiting_takes_the_request_out_of_the_queue(
    start: Callable[..., Any],
    marked: Callable[[], list[psutil.Process]],
    eventually: Callable[..., Any],
    pool: Any,
    tmp_path: Path,
) -> None:
    holding = start("run", "-n", 2, "--", "sh", "-c", "echo runs; read x")
    eventually(lambda: "runs" in holding.out, "all GPUs are taken")
    waiting = start("run", "--", "echo", "it ran", MARK=str(tmp_path))
    eventually(lambda: "position 1" in waiting.log, "it waits")
    waiting.kill()
    eventually(lambda: not marked(), "no process is left")
    eventually(lambda: not pool.client.pool()["queue"], "the request has expired")
    assert waiting.out == ""


@pytest.mark.parametrize("end", ["worker killed", "released by another command"])
def test_a_lease_that_ends_under_the_command(
    start: Callable[..., Any],
    gpupool: Callable[..., Any],
    eventually: Callable[..., Any],
    pool: Any,
    end: str,
) -> None:
    program = (
        "import torch\nx = torch.ones(64, 64, device='cuda')\n"
        "while True:\n    x = (x @ x).tanh()\n    print(x.sum().item(), flush=True)\n"
    )
    running = start("run", "--", sys.executable, "-c", program)
    eventually(lambda: running.out.count("\n") > 3, "it computes")
    (lease,) = pool.client.leases()
    if end == "worker killed":
        os.kill(lease.worker.pid, signal.SIGKILL)
    else:
        assert gpupool("release", lease.id[:13]).returncode == 0
    assert running.wait() == 1
    (told,) = [line for line in running.log.splitlines() if line.startswith("[WARN]")]
    assert f"Lease {lease.id} has ended while the command runs: " in told
    assert ("killed" if end == "worker killed" else "released") in told
    assert "GPU worker of this lease is gone" in running.log
    assert pool.idle()


def test_a_command_goes_on_after_its_worker_has_crashed(
    start: Callable[..., Any], gpupool: Callable[..., Any], eventually: Callable[..., Any], pool: Any
) -> None:
    program = (
        "import torch\nx = torch.ones(64, 64, device='cuda')\n"
        "try:\n"
        "    while True:\n        x = (x @ x).tanh()\n        print(x.sum().item(), flush=True)\n"
        "except RuntimeError as e:\n    print(e, flush=True)\n"
        "print('and then', torch.ones(3, device='cuda').sum().item(), flush=True)\ninput()\n"
    )
    running = start("run", "--", sys.executable, "-c", program)
    eventually(lambda: running.out.count("\n") > 3, "it computes")
    (lease,) = pool.client.leases()
    os.kill(lease.worker.pid, signal.SIGSEGV)
    eventually(lambda: "and then 3.0" in running.out, "it goes on")
    told = running.out[running.out.index("the GPU worker") :]
    assert (
        "another one has taken its place" in told and "aten::mm" in told and 'File "<string>", line 5' in told
    )
    now = eventually(
        lambda: (known := pool.client.lease(lease.id)).worker != lease.worker and known,
        "the pool knows the new worker",
    )
    assert (now.id, now.state.value, now.slices) == (lease.id, "ACTIVE", lease.slices)
    assert now.worker.pid != lease.worker.pid
    written = eventually(
        lambda: '"replace"' in (trail := gpupool("audit", "--json").stdout) and trail, "the trail has it"
    )
    assert "its worker was killed by SIGSEGV" in written
    running.close_stdin()
    assert running.wait() == 1 and "[WARN]" not in running.log
    assert pool.idle()

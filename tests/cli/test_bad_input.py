"""Everything that can be typed wrongly: one clear line, a non-zero exit code, and nothing has happened."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DO = ("--", "true")


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (("run", "-p", "0", *DO), {}, "above 0 and at most 1, not '0'"),
        (("run", "-p", "1.5", *DO), {}, "above 0 and at most 1, not '1.5'"),
        (("run", "-p", "-0.5", *DO), {}, "above 0 and at most 1, not '-0.5'"),
        (("run", "-p", "nan", *DO), {}, "above 0 and at most 1, not 'nan'"),
        (("run", "-p", "abc", *DO), {}, "must be a number above 0 and at most 1, not 'abc'"),
        (("run", "-n", "0", *DO), {}, "a whole number from 1 up, not '0'"),
        (("run", "-n", "-1", *DO), {}, "a whole number from 1 up, not '-1'"),
        (("run", "-n", "x", *DO), {}, "a whole number from 1 up, not 'x'"),
        (("run", "-n", "1.5", *DO), {}, "a whole number from 1 up, not '1.5'"),
        (("run", "-n"), {}, "-n/--num-gpus: expected one argument"),
        (("run", "-m", "0", *DO), {}, "a whole number of MiB from 1 up, not '0'"),
        (("run", "-m", "4GB", *DO), {}, "a whole number of MiB from 1 up, not '4GB'"),
        (("run", "-p", "0.5", "-m", "1000", *DO), {}, "either -p"),
        (("run", "--filter", "colour=red", *DO), {}, "unknown filter 'colour'; there are name, server,"),
        (("run", "--filter", "name", *DO), {}, "NAME=VALUE"),
        (("run", "--filter", "index=0", "--filter", "index=1", *DO), {}, "index is given twice"),
        (("run", "--attach", "sideways", *DO), {}, "auto"),
        (("run",), {}, "which command?"),
        (("run", "-n", "1", "--"), {}, "which command?"),
        (("run", "--nonsense", *DO), {}, "unknown option: --nonsense"),
        (("run", "--num", "1", *DO), {}, "unknown option: --num"),
        (("run", *DO), {"NUM_GPUS": "abc"}, "NUM_GPUS in the environment"),
        (("run", *DO), {"PARTIAL_GPU": "80%"}, "PARTIAL_GPU in the environment"),
        (("request", "-p", "2"), {}, "above 0 and at most 1, not '2'"),
        (("request", "--for", "0"), {}, "a process id"),
        (("request", "--for", "4194304"), {}, "there is no process 4194304"),
        (("release",), {}, "which leases?"),
        (("release", "abc", "--all"), {}, "which leases?"),
        (("leases", "--nonsense"), {}, "unknown option: --nonsense"),
        (("gpus", "more"), {}, "more"),
        (("server", "--port", "x"), {}, "a port is a number from 0"),
        (("server", "--port", "65536"), {}, "a port is a number from 0"),
        (("server", "--LocalEngine.emulated_count=two"), {}, "LocalEngine.emulated_count must be"),
        (("server", "--LocalEngine.emulated_count=0"), {}, "from 1 up"),
        (("server", "--LocalEngine.emulate=often"), {}, "'always'"),
        (("server", "--LocalEngine.colour=red"), {}, "no setting LocalEngine.colour"),
        (("server", "--config", "/nonexistent.py"), {}, "no configuration file"),
        (("server", "--ephemeral", "--port", "1"), {}, "--ephemeral"),
        (("dance",), {}, "unknown command 'dance'; there are run, request"),
        (("--dance",), {}, "unknown option '--dance'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_is_told_in_one_line(
    gpupool: Callable[..., Any],
    last_line: Callable[..., str],
    jupyter_home: Path,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    words: str,
) -> None:
    done = gpupool(*arguments, **environment)
    assert done.returncode == 2
    line = last_line(done)
    assert line.startswith("gpupool: ") and words in line, line
    assert done.stdout == ""
    assert not list(jupyter_home.glob("*/gpupool")), "something was started"


@pytest.mark.parametrize(
    ("program", "code", "words"), [("no-such-program", 127, "not found"), ("./data", 126, "not executable")]
)
def test_a_command_that_cannot_run_takes_no_lease(
    gpupool: Callable[..., Any],
    last_line: Callable[..., str],
    jupyter_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(jupyter_home)
    done = gpupool("run", "--", program)
    assert done.returncode == code and words in last_line(done)
    assert not list(jupyter_home.glob("*/gpupool")), "something was started"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "gpus.example:x", "ftp://127.0.0.1"])
@pytest.mark.parametrize("command", [("run", *DO), ("leases",), ("smi",), ("release", "--all"), ("health",)])
def test_an_unreachable_pool(
    gpupool: Callable[..., Any], last_line: Callable[..., str], command: tuple[str, ...], url: str
) -> None:
    done = gpupool(command[0], "--url", url, *command[1:])
    assert done.returncode == 1 and url in last_line(done)


def test_a_pool_that_wants_another_token(
    gpupool: Callable[..., Any], last_line: Callable[..., str], pool: Any
) -> None:
    done = gpupool("run", *DO, GPUPOOL_TOKEN="guessed")
    assert done.returncode == 1 and "does not admit" in last_line(done)
    assert "guessed" not in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-n", "9"), "9 GPUs"),
        (("-m", "40000"), "40000"),
        (("--filter", "name=H200"), "H200"),
        (("--attach", "direct"), "emulated GPUs cannot be attached directly"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_the_pool_can_never_grant(
    gpupool: Callable[..., Any],
    last_line: Callable[..., str],
    pool: Any,
    options: tuple[str, ...],
    words: str,
    tmp_path: Path,
) -> None:
    known = len(pool.client.leases(include_ended=True))
    done = gpupool("run", *options, "--", "touch", tmp_path / "ran")
    assert done.returncode == 1 and words in last_line(done)
    assert len(pool.client.leases(include_ended=True)) == known
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_under_the_ledger(
    gpupool: Callable[..., Any], last_line: Callable[..., str], pool: Any, tmp_path: Path
) -> None:
    # No file of the pool may grow any more: to the ledger this is a disk without room.
    soft, hard = resource.prlimit(pool.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pool.process.pid, resource.RLIMIT_FSIZE, (1, hard))
    try:
        done = gpupool("run", "--", "touch", tmp_path / "ran")
    finally:
        resource.prlimit(pool.process.pid, resource.RLIMIT_FSIZE, (soft, hard))
    assert done.returncode == 1 and "ledger" in last_line(done)
    assert not (tmp_path / "ran").exists()
    assert pool.idle() and pool.granted() == [0, 0]
    assert gpupool("run", "--", "touch", tmp_path / "ran").returncode == 0
    assert (tmp_path / "ran").exists()


def test_releasing_what_is_not_there(
    gpupool: Callable[..., Any], last_line: Callable[..., str], pool: Any
) -> None:
    done = gpupool("release", "00000000")
    assert done.returncode == 1 and "00000000" in last_line(done)

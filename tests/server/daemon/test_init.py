"""`gpupool server init` on a directory that holds something already."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import os
import shutil
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.server.daemon import directory

from .conftest import Server, gpupool


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_server_that_is_there_is_refused_or_kept(tmp_path: Path) -> None:
    options = ("--address", "gpus.example", "--keep")
    done = gpupool("server", "init", *options, tmp_path / "server")
    assert done.returncode == 0, done.stderr
    made = files(tmp_path)
    assert "server/gpupool_config.py" in made
    again = gpupool("server", "init", *options, tmp_path / "server")
    assert (again.returncode, again.stdout.count("\n")) == (0, 1), again.stderr
    assert "has a configuration already" in again.stdout
    refused = gpupool("server", "init", *options[:2], tmp_path / "server")
    assert refused.returncode == 1
    assert "is not empty" in refused.stderr and refused.stderr.count("\n") == 1
    assert files(tmp_path) == made


def test_what_is_no_server_is_refused_even_so(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    done = gpupool("server", "init", "--address", "gpus.example", "--keep", tmp_path)
    assert done.returncode == 1
    assert "is not empty" in done.stderr
    assert list(files(tmp_path)) == ["notes"]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_an_administrator_is_made_by_the_ledger_of_a_running_server(
    new_server: Callable[..., Server], tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    server = new_server()
    with contextlib.ExitStack() as stack:
        if kind == "postgresql":
            url = stack.enter_context(request.getfixturevalue("postgresql").database("ready"))
            with (server.folder / directory.CONFIGURATION).open("a") as f:
                f.write(f"c.PoolService.db_url = {url!r}\n")
        stack.callback(server.end)
        server.start()
        made = gpupool("server", "administrator", "--output", tmp_path / "admin.tar", server.folder)
        assert made.returncode == 0, made.stderr
        (tmp_path / "admin").mkdir()
        with tarfile.open(tmp_path / "admin.tar") as tar:
            tar.extractall(tmp_path / "admin")
        bundle = str(tmp_path / "admin")
        again = gpupool("server", "administrator", "--output", tmp_path / "admin.tar", server.folder)
        assert again.returncode == 1 and "File exists" in again.stderr
        listed = gpupool("token", "list", GPUPOOL_CONFIG_DIR=bundle)
        assert listed.returncode == 0, listed.stderr
        # One of `server init`, which a ledger elsewhere does not have.
        assert listed.stdout.count("(administrator)") == (2 if kind == "sqlite" else 1)
        assert "by a command that reached the ledger" in gpupool("audit", GPUPOOL_CONFIG_DIR=bundle).stdout


class Killed(BaseException):
    """In place of SIGKILL: whatever holds the directory is closed, and nothing else happens."""


def killed_at(step: int, act: Callable[[], object]) -> bool:
    """Run ``act`` up to its ``step``-th line in the module of the directory; whether it got that far."""
    lines = itertools.count()

    def trace(frame: types.FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        if frame.f_code.co_filename != directory.__file__:
            return None
        if event == "line" and next(lines) == step:
            raise Killed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except Killed:
        return True
    finally:
        sys.settrace(before)
    return False


def whole(folder: Path, made: list[Path]) -> bool:
    found = {path for path in folder.rglob("*") if path.is_file() and "ledger" not in path.name}
    return found == set(made) and (folder / directory.LEDGER).is_file()


def test_what_a_killed_init_left_is_no_obstacle(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    names = [path.relative_to(folder) for path in directory.initialise(folder, ["gpus.example"])]
    finished = 0
    for step in itertools.count():
        folder = tmp_path / str(step)
        made = [folder / name for name in names]
        was_killed = killed_at(step, functools.partial(directory.initialise, folder, ["gpus.example"]))
        if (folder / directory.CONFIGURATION).exists():
            finished += was_killed
        else:
            assert was_killed and directory.initialise(folder, ["gpus.example"]) == made
        assert whole(folder, made), step
        before = files(folder)
        with pytest.raises(InvalidRequest, match="is not empty"):
            directory.initialise(folder, ["gpus.example"])
        assert files(folder) == before
        if not was_killed:
            break
        shutil.rmtree(folder)
    assert step > 50 and finished


@pytest.mark.parametrize("name", ["notes", "admin/notes", "ca.crt.mine"])
@pytest.mark.parametrize("left", [[], [directory.UNFINISHED, directory.CA_KEY, "admin/ca.crt"]])
def test_beside_a_file_of_somebody_else_nothing_is_changed(
    tmp_path: Path, left: list[str], name: str
) -> None:
    (tmp_path / "admin").mkdir()
    for one in [*left, name]:
        (tmp_path / one).write_text("x")
    before = files(tmp_path)
    with pytest.raises(InvalidRequest, match="nothing was changed"):
        directory.initialise(tmp_path, ["gpus.example"])
    assert files(tmp_path) == before


def test_a_directory_in_use_is_not_taken_for_an_unfinished_one(tmp_path: Path) -> None:
    """An earlier version could leave its marker beside a configuration, which somebody may move away for a while."""
    directory.initialise(tmp_path, ["gpus.example"])
    before = files(tmp_path)
    (tmp_path / directory.UNFINISHED).touch()
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="is not empty"):
            directory.initialise(tmp_path, ["gpus.example"])
        assert files(tmp_path) == before
    (tmp_path / directory.CONFIGURATION).rename(tmp_path / "kept.py")
    with pytest.raises(InvalidRequest, match="is not empty"):
        directory.initialise(tmp_path, ["gpus.example"])
    assert (tmp_path / directory.LEDGER).exists()


def test_two_at_once_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one comes whenever the first is about to write, and is refused each time."""
    came, real = 0, directory._write

    def write(path: Path, content: bytes) -> None:
        nonlocal came
        with pytest.raises(InvalidRequest, match="another `gpupool server init` writes"):
            directory.initialise(tmp_path, ["gpus.example"])
        came += 1
        real(path, content)

    monkeypatch.setattr(directory, "_write", write)
    assert whole(tmp_path, directory.initialise(tmp_path, ["gpus.example"]))
    assert came == 7


@pytest.mark.parametrize("is_first", [True, False])
def test_who_comes_while_another_finishes_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    """The other one finishes after this one has looked, and before it has opened the marker or locked it."""
    module, name = (os, "open") if is_first else (fcntl, "flock")
    real, made, before = getattr(module, name), [], {}

    def late(*args: Any) -> Any:
        monkeypatch.setattr(module, name, real)
        made.extend(directory.initialise(tmp_path, ["gpus.example"]))
        before.update(files(tmp_path))
        return real(*args)

    monkeypatch.setattr(module, name, late)
    with pytest.raises(InvalidRequest, match="is not empty"):
        directory.initialise(tmp_path, ["gpus.example"])
    assert whole(tmp_path, made) and files(tmp_path) == before

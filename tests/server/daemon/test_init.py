"""`gpupool server init` on a directory that holds something already."""

from __future__ import annotations

from pathlib import Path

from .conftest import gpupool


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

"""`gpupool kubernetes copy-client`, for images that lack the client: what it writes, used by other Pythons."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from jupyter_gpupool.kubernetes.client_copy import copy_client

from ..server.daemon.conftest import Server, gpupool, initialised

pytestmark = pytest.mark.skipif(
    sys.prefix == sys.base_prefix, reason="needs a virtual environment: the Python beneath it is the image's"
)

#: The Python beneath this environment: it sees none of its packages.
PYTHON = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
#: What the image of the tests has no package of, by the beginnings of their names.
LACKING = ("gpupool", "httpx", "httpcore", "msgpack", "traitlets", "psutil", "yaml", "pyyaml")


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volume")
    done = gpupool("kubernetes", "copy-client", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = initialised(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.end()


def image(folder: Path, packages: Path | None = None) -> dict[str, str]:
    """The environment of an image with a Python of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "python3").symlink_to(PYTHON)
    made = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)}
    return made if packages is None else {**made, "PYTHONPATH": str(packages)}


def run(environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    """As in a container of that image."""
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=environment,
        cwd=environment["HOME"],
        timeout=300,
    )


def test_a_program_of_an_image_without_the_client_computes_on_its_slices(
    copied: Path, server: Server, tmp_path: Path
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not any(name in entry.name.lower() for name in LACKING):
            (packages / entry.name).symlink_to(entry)
    environment = image(tmp_path / "bin", packages)
    assert run(environment, "python3", "-c", "import jupyter_gpupool").returncode == 1
    server.bundle(tmp_path / "bundle")
    environment["GPUPOOL_CONFIG_DIR"] = str(tmp_path / "bundle")
    program = "import torch; x = torch.ones(3, device='cuda') * 2; print(torch.cuda.get_device_name(), x.sum().item())"
    done = run(environment, copied / "bin/gpupool", "run", "-p", "0.2", "--", "python3", "-c", program)
    assert done.returncode == 0, done.stderr
    assert "(emulated) 6.0" in done.stdout
    assert server.administrator().leases() == []


def test_a_program_can_attach_by_itself(copied: Path, server: Server, tmp_path: Path) -> None:
    environment = image(tmp_path / "bin")
    server.bundle(tmp_path / "bundle")
    environment |= {"GPUPOOL_CONFIG_DIR": str(tmp_path / "bundle"), "PYTHONPATH": str(copied / "lib")}
    program = "import jupyter_gpupool as g; from jupyter_gpupool.client import http; print(g.attach, http.PoolClient)"
    done = run(environment, "python3", "-c", program)
    assert done.returncode == 0, done.stderr
    assert "function attach" in done.stdout and "PoolClient" in done.stdout


def test_what_the_image_has_takes_precedence_over_what_is_brought(copied: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "yaml.py").write_text("")
    environment = image(tmp_path / "bin")
    environment["PYTHONPATH"] = f"{copied / 'lib'}:{own}"
    done = run(environment, "python3", "-c", "import jupyter_gpupool, yaml, msgpack; print(yaml, msgpack)")
    assert done.returncode == 0, done.stderr
    yaml, _, msgpack = done.stdout.partition("> <")
    assert str(own) in yaml
    assert str(copied / "lib/gpupool-dependencies") in msgpack


@pytest.mark.parametrize(("python", "words"), [("exit 1", "is older than 3.10"), ("", "has no Python")])
def test_an_image_without_a_python_for_it_is_told_so(
    copied: Path, tmp_path: Path, python: str, words: str
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    if python:
        (folder / "python3").write_text(f"#!/bin/sh\n{python}\n")
        (folder / "python3").chmod(0o755)
    done = run(
        {"PATH": str(folder), "HOME": str(tmp_path)}, "/bin/sh", copied / "bin/gpupool", "run", "--", "true"
    )
    assert done.returncode == 127
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_it_is_small_readable_by_all_and_can_be_written_again(copied: Path) -> None:
    copy_client(copied)
    files = [file for file in copied.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 64 << 20  # of the volume's 256 MiB
    assert all(file.stat().st_mode & 0o004 for file in files)
    assert os.access(copied / "bin/gpupool", os.X_OK)
    assert not list(copied.rglob("labextension"))


def test_a_directory_that_cannot_be_written_is_one_line() -> None:
    done = gpupool("kubernetes", "copy-client", "/dev/null/client")
    assert done.returncode == 1
    assert "the client cannot be copied to /dev/null/client" in done.stderr
    assert done.stderr.count("\n") == 1

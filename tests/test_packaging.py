"""What an installation holds: the wheel is built, and installed away from the sources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

SHARED = "jupyter_gpupool-{}.data/data/"
PANEL = "share/jupyter/labextensions/jupyter-gpupool/"


#: Where this environment's jlpm and node are, on the PATH or not.
TOOLS = sysconfig.get_path("scripts")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PATH": os.pathsep.join([TOOLS, os.environ["PATH"]]), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def version(project_root: Path) -> str:
    return json.loads((project_root / "package.json").read_text())["version"]


@pytest.fixture(scope="module")
def wheel(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a user's pip does it, though with the build tools of this environment."""
    where = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", where, cwd=project_root)
    return next(where.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that holds the wheel, and borrows what it depends on."""
    where = tmp_path_factory.mktemp("environment")
    venv.create(where, with_pip=False)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    run(*pip, "--prefix", where, wheel, cwd=where)
    scheme = {"base": str(where), "platbase": str(where)}
    # Python does not follow the .pth files of a directory that it finds by a .pth file: no way back to the sources.
    Path(sysconfig.get_path("purelib", vars=scheme), "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return where / "bin" / "python"


def test_the_wheel_holds_all_of_it(wheel: Path, version: str) -> None:
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        shared = SHARED.format(version)
        built = json.loads(z.read(f"{shared}{PANEL}package.json"))
        config = json.loads(z.read(f"{shared}etc/jupyter/jupyter_server_config.d/jupyter_gpupool.json"))
        commands = z.read(f"jupyter_gpupool-{version}.dist-info/entry_points.txt").decode()
    assert built["version"] == version
    assert f"{shared}{PANEL}{built['jupyterlab']['_build']['load']}" in names
    assert f"{shared}{PANEL}schemas/jupyter-gpupool/plugin.json" in names
    assert f"{shared}{PANEL}install.json" in names
    assert config["ServerApp"]["jpserver_extensions"]["jupyter_gpupool"] is True
    assert "jupyter_gpupool/examples/mnist.py" in names
    for name in ("grafana.json", "deploy/gpupool.service", "deploy/Containerfile"):
        assert f"{shared}share/jupyter_gpupool/{name}" in names
    assert f"jupyter_gpupool-{version}.dist-info/licenses/LICENSE" in names
    assert "gpupool = jupyter_gpupool.cli.app:main" in commands
    assert "[torch.backends]\ngpupool = jupyter_gpupool.remote.autoload:activate" in commands
    strangers = {n.split("/")[0] for n in names} - {"jupyter_gpupool"}
    assert all(n.startswith(f"jupyter_gpupool-{version}.") for n in strangers)


def test_an_sdist_installs_without_node(project_root: Path, tmp_path: Path, version: str) -> None:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, cwd=project_root)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as tar:
        # Python learnt to ask for it in the middle of a release; the archive is our own.
        tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    tree = tmp_path / f"jupyter_gpupool-{version}"
    assert (tree / "jupyter_gpupool" / "labextension" / "static" / "style.js").is_file()
    # A jlpm that fails stands for a machine that has neither Node nor a network.
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "jlpm").write_text("#!/bin/sh\necho jlpm was called >&2\nexit 1\n")
    (tools / "jlpm").chmod(0o755)
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, cwd=tree, PATH=path)
    assert next(tmp_path.glob("*.whl")).is_file()


def test_jupyterlab_finds_the_panel(python: Path, tmp_path: Path, version: str) -> None:
    listed = run(python, "-m", "jupyterlab.labextensions", "list", cwd=tmp_path)
    (line,) = [x for x in listed.splitlines() if "jupyter-gpupool" in x]
    assert f"v{version}" in line and "enabled" in line and "OK" in line


def test_jupyter_server_finds_the_extension_enabled(python: Path, tmp_path: Path, version: str) -> None:
    listed = run(python, "-m", "jupyter_server", "extension", "list", cwd=tmp_path)
    about_us = [line for line in listed.splitlines() if "jupyter_gpupool" in line]
    assert any("enabled" in line for line in about_us), listed
    assert any(version in line and "OK" in line for line in about_us), listed


def test_the_version_is_known_at_run_time(python: Path, tmp_path: Path, version: str) -> None:
    program = "import jupyter_gpupool; print(jupyter_gpupool.__version__, jupyter_gpupool.__file__)"
    said, file = run(python, "-c", program, cwd=tmp_path).split()
    assert said == version
    assert Path(file).is_relative_to(python.parent.parent)

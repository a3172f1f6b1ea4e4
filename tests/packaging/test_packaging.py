"""What an installation holds: wheel and sdist are built, and installed away from the sources."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

SHARED = "jupyter_gpupool-{}.data/data/"
LIBRARY = "jupyter_gpupool/jax/client/libhandles.so.1"
PANEL = "share/jupyter/labextensions/jupyter-gpupool/"


#: Where this environment's jlpm and node are, on the PATH or not.
TOOLS = sysconfig.get_path("scripts")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, "PATH": os.pathsep.join([TOOLS, os.environ["PATH"]]), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(kind: str, where: Path, sources: Path, **environment: str) -> None:
    """Built as a user's pip does it, though with the build tools of this environment. ``kind``: wheel or sdist."""
    words = (sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", where)
    run(*words, cwd=sources, **environment)


@pytest.fixture(scope="module")
def wheel(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("wheel")
    build("wheel", where, project_root)
    return next(where.glob("*.whl"))


@pytest.fixture(scope="module")
def version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


@pytest.fixture(scope="module")
def sources(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, unpacked."""
    where = tmp_path_factory.mktemp("sdist")
    build("sdist", where, project_root)
    with tarfile.open(next(where.glob("*.tar.gz"))) as tar:
        # Python 3.10 and 3.11 know the argument from some patch release on; the archive is our own.
        tar.extractall(where, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(path for path in where.iterdir() if path.is_dir())


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
        assert z.getinfo("jupyter_gpupool/bin/nvidia-smi").external_attr >> 16 & 0o111 == 0o111
        commands = z.read(f"jupyter_gpupool-{version}.dist-info/entry_points.txt").decode()
    assert Version(built["version"]) == Version(version)
    assert f"{shared}{PANEL}{built['jupyterlab']['_build']['load']}" in names
    assert f"{shared}{PANEL}schemas/jupyter-gpupool/plugin.json" in names
    assert f"{shared}{PANEL}install.json" in names
    assert config["ServerApp"]["jpserver_extensions"]["jupyter_gpupool"] is True
    assert "jupyter_gpupool/examples/mnist.py" in names
    for name in ("grafana.json", "deploy/gpupool.service", "deploy/Containerfile"):
        assert f"{shared}share/jupyter_gpupool/{name}" in names
    assert f"jupyter_gpupool-{version}.dist-info/licenses/LICENSE" in names
    assert "gpupool = jupyter_gpupool.cli.app:main" in commands
    assert "[torch.backends]\ngpupool = jupyter_gpupool.pytorch.client.autoload:activate" in commands
    strangers = {n.split("/")[0] for n in names} - {"jupyter_gpupool"}
    assert all(n.startswith(f"jupyter_gpupool-{version}.") for n in strangers)


def test_the_wheel_names_the_packages_that_its_pages_contain(
    wheel: Path, version: str, project_root: Path
) -> None:
    with zipfile.ZipFile(wheel) as z:
        bill = json.loads(z.read(f"jupyter_gpupool-{version}.dist-info/sboms/bundled.cdx.json"))
        page = z.read(f"{SHARED.format(version)}{PANEL}page/page.js").decode()
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["version"] == version
    found = {one["name"]: one for one in bill["components"]}
    locked = (project_root / "yarn.lock").read_text()
    for name in ("react", "react-dom", "uplot", "@lumino/coreutils"):  # the page's, and the panel's chart
        of = found[name]
        assert f'"{name}@npm:{of["version"]}"' in locked, "it is the version that the lock file names"
        assert of["purl"] == f"pkg:npm/{name.replace('@', '%40')}@{of['version']}"
        assert of["licenses"][0]["expression"] in ("MIT", "BSD-3-Clause")
    assert found["react-dom"]["version"] in page, "the page really contains it"
    assert bill["dependencies"] == [
        {
            "ref": f"pkg:pypi/jupyter-gpupool@{version}",
            "dependsOn": sorted(one["purl"] for one in found.values()),
        }
    ]


def test_the_jax_plugin_is_compiled_into_the_wheel_where_a_compiler_is(
    project_root: Path, wheel: Path, sources: Path, python: Path, tmp_path: Path, version: str
) -> None:
    assert (sources / LIBRARY).with_name("handles.c").is_file() and not (sources / LIBRARY).exists()
    build("wheel", tmp_path, sources, CC="false")
    (plain,) = tmp_path.glob("*.whl")
    assert plain.name == f"jupyter_gpupool-{version}-py3-none-any.whl"
    with zipfile.ZipFile(plain) as z:
        commands = z.read(f"jupyter_gpupool-{version}.dist-info/entry_points.txt").decode()
        assert LIBRARY not in z.namelist()
    assert "[jax_plugins]\ngpupool = jupyter_gpupool.jax.client.plugin" in commands
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("the rest needs a C compiler")
    with zipfile.ZipFile(wheel) as z:
        assert LIBRARY in z.namelist()
        hook = runpy.run_path(str(project_root / ".make/hatch_build.py"), run_name="hatch_build")
        tag = hook["platform_tag"](z.read(LIBRARY), sysconfig.get_platform())
    assert wheel.name == f"jupyter_gpupool-{version}-py3-none-{tag}.whl"
    load = "from jupyter_gpupool.jax.client.native import Native; print(Native().event(True) != 0)"
    assert run(python, "-c", load, cwd=tmp_path) == "True\n"


@pytest.mark.parametrize(
    ("needs", "platform", "tag"),
    [
        (b"..GLIBC_2.2.5..GLIBC_2.14..", "linux-x86_64", "manylinux_2_17_x86_64"),
        (b"..GLIBC_2.17..", "linux-aarch64", "manylinux_2_17_aarch64"),
        (b"..GLIBC_2.2.5..GLIBC_2.34..", "linux-x86_64", "manylinux_2_34_x86_64"),
        (b"another C library", "linux-x86_64", "linux_x86_64"),
    ],
)
def test_a_wheels_platform_is_what_its_library_needs(
    project_root: Path, needs: bytes, platform: str, tag: str
) -> None:
    hook = runpy.run_path(str(project_root / ".make/hatch_build.py"), run_name="hatch_build")
    assert hook["platform_tag"](needs, platform) == tag


def test_an_sdist_installs_without_node(sources: Path, tmp_path: Path, version: str) -> None:
    assert sources.name == f"jupyter_gpupool-{version}"
    assert (sources / "jupyter_gpupool" / "labextension" / "static" / "style.js").is_file()
    requirements = "import hatchling.build as b; print(*b.get_requires_for_build_wheel())"
    assert run(sys.executable, "-c", requirements, cwd=sources).strip() == "", "only hatchling and hatch-vcs"
    # A jlpm that fails stands for a machine that has neither Node nor a network.
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "jlpm").write_text("#!/bin/sh\necho jlpm was called >&2\nexit 1\n")
    (tools / "jlpm").chmod(0o755)
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    build("wheel", tmp_path, sources, PATH=path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[1] == version


def test_sources_without_git_have_a_version(sources: Path, tmp_path: Path) -> None:
    """A copy of the checkout, which unlike an sdist has no PKG-INFO."""
    copy = shutil.copytree(sources, tmp_path / "copy", ignore=shutil.ignore_patterns("PKG-INFO"))
    program = (
        "from hatchling.metadata.core import ProjectMetadata\n"
        "from hatchling.plugin.manager import PluginManager\n"
        "print(ProjectMetadata('.', PluginManager()).version)"
    )
    assert run(sys.executable, "-c", program, cwd=copy).split() == ["0.1.0.dev0"]


@pytest.mark.parametrize(
    ("version", "semantic"),
    [
        ("0.1.0", "0.1.0"),
        ("1.2", "1.2.0"),
        ("0.2.0rc1", "0.2.0-rc.1"),
        ("0.1.dev3", "0.1.0-dev.3"),
        ("1.0.0b2.dev4", "1.0.0-b.2.dev.4"),
    ],
)
def test_the_extension_has_the_same_version_as_npm_writes_it(
    project_root: Path, version: str, semantic: str
) -> None:
    hook = runpy.run_path(str(project_root / ".make/hatch_build.py"), run_name="hatch_build")
    assert hook["semantic"](version) == semantic


def test_sdist_and_wheel_install_into_a_clean_environment(
    wheel: Path, sources: Path, tmp_path: Path, version: str
) -> None:
    """With every dependency that pip resolves, and nothing of this environment."""
    where = tmp_path / "environment"
    venv.create(where, with_pip=True)
    pip = [where / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile"]
    for install in ([*pip, sources], [*pip, "--no-deps", "--force-reinstall", wheel]):
        run(*install, cwd=tmp_path)
        assert f"gpupool {version}" in run(where / "bin" / "gpupool", "--version", cwd=tmp_path)
        listed = run(where / "bin" / "jupyter-server", "extension", "list", cwd=tmp_path)
        assert f"jupyter_gpupool {version}" in re.sub(r"\x1b\[[0-9;]*m", "", listed)
        assert (where / PANEL / "package.json").is_file()


def test_jupyterlab_finds_the_panel(python: Path, tmp_path: Path, version: str) -> None:
    listed = run(python, "-m", "jupyterlab.labextensions", "list", cwd=tmp_path)
    (line,) = [x for x in listed.splitlines() if "jupyter-gpupool" in x]
    shown = re.search(r"jupyter-gpupool v(\S+) ", line)
    assert shown and Version(shown[1]) == Version(version)
    assert "enabled" in line and "OK" in line


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

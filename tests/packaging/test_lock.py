"""The lock files: what tests and images install is in them, with hashes, within the ranges of pyproject.toml."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: What an image contains, by its lock file; and what tests do.
EXTRAS = {
    ".make/lock.txt": ("test",),
    "docs/deploy/lock-torch.txt": ("torch",),
    "docs/deploy/lock-farm.txt": ("torch", "ray", "postgresql"),
}


@pytest.fixture(scope="module")
def made(project_root: Path) -> Iterator[Path]:
    """The folder of the programs behind make, from which they can be imported."""
    folder = project_root / ".make"
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def lock(made: Path) -> ModuleType:
    return importlib.import_module("lock")


def wanted(root: Path, extras: tuple[str, ...]) -> list[Requirement]:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    found = [Requirement(line) for line in project["dependencies"]]
    for extra in extras:
        for one in map(Requirement, project["optional-dependencies"][extra]):
            found += wanted(root, tuple(one.extras)) if one.name == "jupyter_gpupool" else [one]
    return found


@pytest.mark.parametrize("name", EXTRAS)
def test_every_direct_dependency_is_locked_within_its_range(
    project_root: Path, lock: ModuleType, name: str
) -> None:
    locked: dict[str, list[Requirement]] = {}
    for entry in lock.entries((project_root / name).read_text()):
        one = Requirement(lock.requirement(entry))
        locked.setdefault(canonicalize_name(one.name), []).append(one)
    for need in wanted(project_root, EXTRAS[name]):
        if name == ".make/lock.txt" and need.name == "torch":
            continue  # each machine has a build of its own
        versions = [
            str(one.specifier).removeprefix("==") for one in locked.get(canonicalize_name(need.name), [])
        ]
        assert versions, f"{name} lacks {need}: make lock"
        outside = [v for v in versions if not need.specifier.contains(v, prereleases=True)]
        assert not outside, f"{name} has {need.name} {outside}, which is not {need}: make lock"


@pytest.mark.parametrize("name", EXTRAS)
def test_everything_locked_has_one_version_and_hashes_and_comes_from_any_index(
    project_root: Path, lock: ModuleType, name: str
) -> None:
    text = (project_root / name).read_text()
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    for entry in lock.entries(text):
        assert re.fullmatch(r"[\w.-]+==[\w.!+-]+", lock.requirement(entry).partition(" ; ")[0]), entry
        hashes = re.findall(r"--hash=sha256:([0-9a-f]+)", entry)
        assert hashes and all(len(one) == 64 for one in hashes), entry


def test_tests_bring_no_build_of_pytorch(project_root: Path, lock: ModuleType) -> None:
    text = (project_root / ".make/lock.txt").read_text()
    names = [lock.requirement(entry).partition("==")[0] for entry in lock.entries(text)]
    assert [name for name in names if re.match("torch|triton|cuda|nvidia", name)] == ["nvidia-ml-py"]


def test_an_image_has_the_versions_that_are_tested(project_root: Path, lock: ModuleType) -> None:
    tested = set(lock.constraints((project_root / ".make/lock.txt").read_text()).splitlines())
    tested_names = {line.partition("==")[0] for line in tested}
    for name in ("docs/deploy/lock-torch.txt", "docs/deploy/lock-farm.txt"):
        for line in lock.constraints((project_root / name).read_text()).splitlines():
            package, _, rest = line.partition("==")
            if package in tested_names:
                assert f"{package}=={rest.partition(' ;')[0]}" in {one.partition(" ;")[0] for one in tested}


def test_a_checkout_is_installed_by_the_lock(made: Path) -> None:
    install = importlib.import_module("install")
    pip = ["pip", "install"]
    checked, checkout = install.commands(pip, "test,programs", Path("versions.txt"))
    assert {"--require-hashes", str(made / "lock.txt")} <= set(checked)
    assert checkout == [*pip, "--constraint", "versions.txt", "--editable", ".[test,programs]"]
    assert install.commands(pip, "demo", Path("versions.txt")) == [
        [*pip, "--constraint", "versions.txt", "--editable", ".[demo]"]
    ]


def test_a_file_with_another_hash_is_not_installed(made: Path, lock: ModuleType, tmp_path: Path) -> None:
    """pip refuses it, and that is what the program takes for the end."""
    install = importlib.import_module("install")
    name = "gpupool_locked-1.0-py3-none-any.whl"
    build_wheel(tmp_path / name)
    (tmp_path / "lock.txt").write_text(f"gpupool-locked==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(tmp_path), "--no-deps"]
        + ["--target", str(tmp_path / "there"), "--require-hashes", "-r", str(tmp_path / "lock.txt")],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and not (tmp_path / "there").exists()
    assert install.is_wrong(done.stdout + done.stderr)
    assert not install.is_wrong("ERROR: No matching distribution found for gpupool-locked==1.0")


def build_wheel(path: Path) -> None:
    import zipfile

    info = "gpupool_locked-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gpupool-locked\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_what_is_at_its_floor_is_what_users_install(project_root: Path, made: Path) -> None:
    floors = importlib.import_module("floors")
    project = tomllib.loads((project_root / "pyproject.toml").read_text())["project"]
    names = floors.direct(project)
    assert {"tornado", "jupyterhub", "ray", "psycopg", "jupyterlab", "scikit-learn"} <= names
    assert not names & {"ruff", "sphinx", "pytest"}


def test_the_floors_are_tried_every_night(project_root: Path) -> None:
    nightly = yaml.safe_load((project_root / ".github" / "workflows" / "nightly.yml").read_text())
    steps = [step.get("run", "") for step in nightly["jobs"]["floors"]["steps"]]
    assert "make floors" in steps

"""What each part of the package may load, and what no file may say.

The import contracts stand in pyproject.toml, for import-linter; these tests check them, and what runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # import-linter brings it there

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "jupyter_gpupool"


def test_every_import_keeps_the_contracts() -> None:
    """The contracts of pyproject.toml: layers, independence and what a client must not load, transitively."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_folder_has_a_place_among_the_layers() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["id"] == "rooms")
    placed = {name.rpartition(".")[2] for layer in layers for name in layer.split(" | ")}
    folders = {p.parent.name for p in PACKAGE.glob("*/__init__.py")} - {"examples", "labextension"}
    assert folders <= placed, "say in pyproject.toml what these folders may import"


@pytest.mark.parametrize(
    "module",
    [
        "jupyter_gpupool",
        "jupyter_gpupool.transport.specs",
        "jupyter_gpupool.transport.frames",
        "jupyter_gpupool.transport.lifeline",
        "jupyter_gpupool.pool.manager",
        "jupyter_gpupool.jupyter.extension",
        "jupyter_gpupool.cli.app",
    ],
)
def test_works_without_torch(module: str) -> None:
    program = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("module", ["client.http", "lease", "cli.app"])
def test_a_client_loads_nothing_of_a_server(module: str) -> None:
    """A kernel attaches, and a command answers, without having read a database's library first."""
    heavy = ("sqlalchemy", "alembic", "tornado", "torch", "cryptography")
    program = f"import sys, jupyter_gpupool.{module}; sys.exit([m for m in {heavy} if m in sys.modules] or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_example_knows_nothing_of_the_pool() -> None:
    example = (PACKAGE / "examples" / "mnist.py").read_text()
    assert "gpupool" not in example.lower()


def sources() -> list[Path]:
    """Every file of the project that people write, as far as git knows."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so generated files cannot be told from written ones")
    return [p for p in (ROOT / name for name in listed.stdout.splitlines()) if p.is_file()]


def test_no_file_speaks_of_the_machine_it_was_written_on() -> None:
    places = [str(p) for p in (ROOT, Path(sys.prefix), Path.home()) if len(p.parts) > 2]
    hosts = [r"registry\." + r"npmjs", r"registry\." + r"yarnpkg", r"pypi\." + "org", "python" + "hosted"]
    pattern = re.compile("|".join([*map(re.escape, places), *hosts]))
    found = []
    for path in sources():
        if path.suffix in (".png", ".ico"):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found


def test_one_file_of_the_worker_chooses_between_emulated_and_real_gpus_and_two_use_cuda() -> None:
    worker = PACKAGE / "pytorch" / "worker"
    texts = {path.name: path.read_text() for path in worker.rglob("*.py")}
    asks = {name for name, text in texts.items() if re.search(r"\.emulated\b", text)}
    assert asks == {"devices.py"}, "give Device a method for what differs"
    uses = {
        name for name, text in texts.items() if re.search(r"\btorch\.cuda\b(?!\.(nccl|get_arch_list))", text)
    }
    assert uses - {"device.py"} == {"cuda_device.py", "cuda_graphs.py"}, (
        "give Device a method for what differs"
    )

"""The house rules of docs/architecture.md, kept by reading the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jupyter_gpupool"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "labextension" not in p.parts)
MAX_LINES = 450

#: These stand outside the rooms: the package itself leads to faces that it imports when they are used.
DOORS = {"", "__main__", "_version"}


def dotted(path: Path) -> str:
    """The module's name within the package, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a module imports, wherever in it."""
    package = dotted(path).split(".") if dotted(path) else []
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                outer = package[: len(package) - (node.level - 1)]
                base = ".".join(["jupyter_gpupool", *outer, *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def rooms() -> dict[str, set[str]]:
    """The table "room | may import" of the architecture page."""
    table: dict[str, set[str]] = {}
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = text.split("| room | may import |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    for row in rows:
        names, may = row.strip("| ").split("|")
        allowed = set(re.findall(r"`([\w.]+)`", may))
        if "everything above" in may:
            allowed |= set(table)
        for name in re.findall(r"`([\w.]+)`", names):
            table[name] = allowed
    return table


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def test_the_architecture_page_names_every_room() -> None:
    found = {dotted(p).split(".")[0] for p in MODULES} - DOORS - {"examples"}
    assert found <= set(rooms()), "say in docs/architecture.md what these may import"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: dotted(p) or "package")
def test_imports_run_downwards_only(path: Path) -> None:
    name = dotted(path)
    room = name.split(".")[0]
    if room in DOORS:
        return
    allowed = {room} | rooms().get(room, set())
    wrong = []
    for line, imported in imports(path):
        if not imported.startswith("jupyter_gpupool."):
            continue
        inner = imported.removeprefix("jupyter_gpupool.")
        if inner not in ("__version__", "_version.__version__") and not any(
            within(inner, a) for a in allowed
        ):
            wrong.append(f"line {line}: {inner}")
    assert not wrong, f"{room} may import {sorted(allowed)} only"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: dotted(p) or "package")
def test_only_the_data_plane_imports_torch(path: Path) -> None:
    name = dotted(path)
    if name.split(".")[0] in ("remote", "examples") or name == "engines.zygote":
        return
    assert not [line for line, name in imports(path) if within(name, "torch")]


@pytest.mark.parametrize(
    "module",
    [
        "jupyter_gpupool",
        "jupyter_gpupool.remote.specs",
        "jupyter_gpupool.remote.wire",
        "jupyter_gpupool.remote.lifeline",
        "jupyter_gpupool.pool.manager",
        "jupyter_gpupool.jupyter.extension",
        "jupyter_gpupool.cli.app",
    ],
)
def test_works_without_torch(module: str) -> None:
    program = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("module", ["holder", "face", "cli.app"])
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


def test_files_stay_short() -> None:
    long = {
        str(p.relative_to(ROOT)): lines
        for p in sources()
        if p.suffix in (".py", ".ts", ".tsx", ".css", ".mjs")
        and (lines := len(p.read_text().splitlines())) > MAX_LINES
    }
    assert not long, f"more than {MAX_LINES} lines: split by subject"


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

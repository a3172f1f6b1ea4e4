"""Runs tests with the oldest version of every dependency that pyproject.toml admits, all of them together.

    python .make/floors.py [ARGUMENTS OF PYTEST]

The environment is .floors, with this Python. In it are the oldest versions of what the package and its extras name,
and the newest of what these need and of the tools that test. PyTorch stays at the release of the extra `demo`, for its
releases have a matrix of their own, and so do those of JAX, which these tests do not use.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

from lock import constraints, entries, of_pytorch, requirement
from resolver import resolver

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".floors"
#: What users install; the tools that test and build are newer.
EXTRAS = ("hub", "keyring", "lab", "otel", "postgresql", "ray", "torch")
#: What uses the dependencies. Browsers, PyTorch's operators and Kubernetes do not.
TESTS = ("core", "transport", "client", "pool", "gpus", "cli", "jupyter", "hub", "server")
NAME = re.compile(r"[\w.-]+")


def normal(name: str) -> str:
    """Return a package's name in the form by which an index knows it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def direct(project: dict[str, object]) -> set[str]:
    """Return the names that pyproject.toml names: those of the package and of its extras."""
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict) and isinstance(project["dependencies"], list)
    named = [*project["dependencies"], *(line for extra in (*EXTRAS, "demo") for line in extras[extra])]
    return {normal(found[0]) for line in named if (found := NAME.match(line))}


def resolve(uv: Sequence[str], folder: Path) -> Path:
    """Write what the environment contains into a file of requirements, and return it. Raises CalledProcessError."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest, floors, everything = folder / "lowest.txt", folder / "floors.txt", folder / "requirements.txt"
    version = sysconfig.get_python_version()
    common = [*uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", version]
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    # Alone: what they need themselves, at its newest, would ask for newer ones of them.
    oldest = [*common, "--resolution", "lowest", "--no-deps", *extras, "--extra", "demo", "pyproject.toml"]
    subprocess.run([*oldest, "--output-file", str(lowest)], cwd=ROOT, check=True)
    names = direct(project)
    kept = [
        line
        for line in map(requirement, entries(lowest.read_text()))
        if normal(line.partition("==")[0]) in names
    ]
    floors.write_text("\n".join(kept) + "\n")
    print("The oldest versions:", *kept, sep="\n  ", flush=True)
    newest = [*common, "--constraint", str(floors), "--extra", "test", "pyproject.toml"]
    subprocess.run([*newest, "--output-file", str(everything)], cwd=ROOT, check=True)
    # Each machine has a build of PyTorch of its own, with what that needs.
    text = "".join(e for e in entries(everything.read_text()) if not of_pytorch(e))
    everything.write_text(constraints(text))
    return everything


def environment() -> Path:
    """Make the environment, and return its interpreter. Raises CalledProcessError."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    venv.create(FOLDER, with_pip=True)
    with resolver() as uv:
        requirements = resolve(uv, FOLDER)
    python = FOLDER / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--no-compile", "--quiet"]
    variables = {**os.environ, "HATCH_JUPYTER_BUILDER_SKIP_NPM": "1"}
    for words in (["-r", str(requirements)], ["-c", str(requirements), "--editable", ".[test]"]):
        subprocess.run([*pip, *words], cwd=ROOT, env=variables, check=True)
    return python


def main(arguments: list[str]) -> int:
    try:
        python = environment()
    except subprocess.CalledProcessError as e:
        print(f"The oldest versions cannot be installed together here: exit code {e.returncode}")
        return 1
    return subprocess.run(
        [str(python), "-m", "pytest", "-q", "-rs", "-m", "not browser"]
        + (arguments or [f"tests/{name}" for name in TESTS]),
        cwd=ROOT,
        env={**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"},
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

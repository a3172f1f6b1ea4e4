"""Installs the checkout with some of its extras into a virtual environment, and shows how far it is.

    python .make/install.py .venv demo,lab

uv does it where it is on the PATH, pip otherwise, and where uv fails (an index that only pip is configured for).
The versions are those of .make/lock.txt. With the extra `test`, everything of the lock is installed first, and the
hashes of all files are checked; PyTorch, of which each machine has a build of its own, comes after that. Where the
versions of the lock are not to be had, others are installed, and a line says so; a file with a wrong hash never is.
The JupyterLab extension is left out; `make lab` builds and links it. Modules are compiled when they are first
imported: compiling all of PyTorch's would take longer than installing it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import lock

#: How often a line is printed where the output is not a terminal.
REPORT_INTERVAL_S = 10
#: How many lines of the log are printed when the installation fails.
LOG_TAIL_LINES = 30
ROOT = Path(__file__).resolve().parent.parent


class Progress:
    """One line that is rewritten on a terminal; a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._start = self._printed = time.monotonic()
        self._packages: set[str] = set()

    def read(self, line: str) -> None:
        """Take one line of the installer's output."""
        line = re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
        if found := re.match(
            r"(?:Collecting|Processing|Requirement already satisfied:) (?:\S*/)?([\w.]+)", line
        ):
            self._packages.add(found[1])
            self._show(f"{len(self._packages)} packages found, {found[1]}")
        elif line.startswith(("Installing build", "Getting requirements", "Preparing editable")):
            self._show("reading this checkout's requirements")
        elif line.startswith("Installing collected packages:"):
            self._show(f"unpacking {line.count(',') + 1} packages", now=True)
        elif line.startswith(("Resolved", "Prepared", "Installed")):  # uv
            self._show(line[0].lower() + line[1:], now=True)

    def done(self) -> None:
        self._show("installed", now=True)
        if sys.stdout.isatty():
            print()

    def _show(self, what: str, now: bool = False) -> None:
        elapsed = time.monotonic()
        text = f"  {elapsed - self._start:3.0f} s  {what}"
        if sys.stdout.isatty():
            print(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif now or elapsed - self._printed >= REPORT_INTERVAL_S:
            self._printed = elapsed
            print(text, flush=True)


def installers(python: Path) -> list[list[str]]:
    """The commands to try, one after the other."""
    pip = [str(python), "-m", "pip", "install", "--no-compile", "--progress-bar=off", "--no-input"]
    uv = shutil.which("uv")
    return [*([[uv, "pip", "install", "--python", str(python)]] if uv else []), pip]


def commands(installer: Sequence[str], extras: str, constraints: Path | None) -> list[list[str]]:
    """What one installer has to do, in this order. ``constraints``: the versions of the lock; None without the lock."""
    checkout = ["--editable", f".[{extras}]"]
    if constraints is None:
        return [[*installer, *checkout]]
    checked = [*installer, "--require-hashes", "--no-deps", "-r", str(lock.TESTS)]
    return [
        *([checked] if "test" in extras.split(",") else []),
        [*installer, "--constraint", str(constraints), *checkout],
    ]


def is_wrong(output: str) -> bool:
    """Return whether an installer has found a file with another hash than that of the lock."""
    return "DO NOT MATCH THE HASHES" in output or "Hash mismatch for" in output


def install(command: Sequence[str], log: Path) -> bool:
    """Run one installer; False where it fails."""
    environment = {
        # PyTorch for this machine's GPUs, or for its CPU: the default brings gigabytes of CUDA. uv alone knows this.
        # Set it to nothing to take PyTorch from the index that uv is configured for.
        "UV_TORCH_BACKEND": "auto",
        **os.environ,
        "HATCH_JUPYTER_BUILDER_SKIP_NPM": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if not environment["UV_TORCH_BACKEND"]:
        del environment["UV_TORCH_BACKEND"]
    progress = Progress()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    with log.open("w") as file:
        for line in process.stdout:
            file.write(line)
            progress.read(line)
    if process.wait() == 0:
        progress.done()
        return True
    return False


def main(environment: str, extras: str) -> int:
    log = Path(environment, "install.log")
    print(f"Installing into {environment}: this checkout with [{extras}]", flush=True)
    found = installers(Path(environment, "bin", "python").absolute())
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text(lock.constraints(lock.TESTS.read_text()))
        for locked in (constraints, None):
            if locked is None:
                print("The versions of .make/lock.txt cannot be installed here; trying others.", flush=True)
            for installer in found:
                if all(install(command, log) for command in commands(installer, extras, locked)):
                    return 0
                output = log.read_text()
                name = Path(installer[0]).name
                print(f"\n{name} failed:", *output.splitlines()[-LOG_TAIL_LINES:], sep="\n  ")
                if is_wrong(output):
                    print("A file is not the one that was locked: it is damaged, or somebody has changed it.")
                    return 1
    print(f"The whole output is in {log}.")
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

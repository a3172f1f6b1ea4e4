"""Runs a page: its code blocks in their order, and each block of output held against what was printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

_BLOCK = re.compile(r"^(?:<!-- (?P<mark>[^>]+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: ``language`` is bash or python for code, text for what it prints."""

    language: str
    text: str
    mark: str = ""


def blocks(page: str) -> Iterator[Block]:
    for match in _BLOCK.finditer(page):
        yield Block(match["language"], match["text"], match["mark"] or "")


def matches(expected: str, printed: str) -> bool:
    """Whether the expected lines are in what was printed, in their order; ``…`` stands for anything."""
    at = 0
    for line in expected.splitlines():
        pieces = [re.escape(" ".join(piece.split())).replace(r"\ ", r"\s+") for piece in line.split("…")]
        found = re.compile(r"[^\n]*".join(pieces)).search(printed, at)
        if found is None:
            return False
        at = found.end()
    return True


class Session:
    """A shell and a kernel that run a page's blocks, in ``folder`` and with ``environment``."""

    def __init__(self, folder: Path, environment: Mapping[str, str], replace: Callable[[str], str]) -> None:
        self._folder = folder
        self._environment = dict(environment)
        self._replace = replace
        self._background: list[subprocess.Popen[str]] = []
        self._client: NotebookClient | None = None
        #: What the last block of code printed.
        self.printed = ""

    def run(self, block: Block) -> None:
        """Run a block of code. Raises AssertionError with what it printed if it fails."""
        if block.mark.startswith("background: "):
            self._start(block, block.mark.removeprefix("background: "))
        elif block.language == "bash":
            self.printed = self._bash(block.text)
        else:
            self.printed = self._python(block.text)

    def close(self) -> None:
        if self._client is not None:
            self._kernel.__exit__(None, None, None)
        for process in reversed(self._background):
            process.terminate()
        for process in self._background:
            process.wait(300)

    def _start(self, block: Block, ready: str) -> None:
        log = self._folder / f"background-{len(self._background)}.log"
        words = self._replace(block.text).split()
        with log.open("w") as file:
            process = subprocess.Popen(
                words,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=self._environment,
                text=True,
            )
        self._background.append(process)
        while ready not in log.read_text():
            assert process.poll() is None, f"{block.text}{log.read_text()}"
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue

    def _bash(self, text: str) -> str:
        """What the commands print; variables that they set stay set, as in one terminal."""
        kept = self._folder / "environment"
        script = f"set -eu\n{self._replace(text)}\nenv -0 > {kept}\n"
        done = subprocess.run(
            ["bash", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self._folder,
            env=self._environment,
            text=True,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}"
        self._environment = dict(line.split("=", 1) for line in kept.read_text().split("\0") if line)
        return done.stdout

    def _python(self, text: str) -> str:
        """What a notebook's cell with that code prints."""
        if self._client is None:
            self._client = NotebookClient(
                new_notebook(), timeout=300, resources={"metadata": {"path": str(self._folder)}}
            )
            self._kernel = self._client.setup_kernel(env=self._environment)
            self._kernel.__enter__()
        cell = new_code_cell(self._replace(text))
        self._client.nb.cells.append(cell)
        self._client.execute_cell(cell, len(self._client.nb.cells) - 1)
        return "".join(output.get("text", "") for output in cell.outputs)


def environment(home: Path) -> dict[str, str]:
    """That of a user whose home is empty, with this Python's programs first."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("GPUPOOL_", "JUPYTER_"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "HOME": str(home), "PATH": path, "PYTHONUNBUFFERED": "1"}

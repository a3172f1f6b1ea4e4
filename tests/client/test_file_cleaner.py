"""Files with leases go with the process that has made them, however it ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import sys
from pathlib import Path
from jupyter_gpupool.client import file_cleaner

folder, file, kept = map(Path, sys.argv[1:])
folder.mkdir()
for path in (folder / "lease.json", file, kept):
    path.write_text("a secret")
for path in (folder, file, kept):
    file_cleaner.remove_at_end(path)
file_cleaner.forget(kept)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [False, True], ids=["end", "kill"])
def test_what_a_process_has_left_is_removed_after_it(
    tmp_path: Path, eventually: Callable[..., Any], killed: bool
) -> None:
    folder, file, kept = tmp_path / "folder", tmp_path / "file", tmp_path / "kept"
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, folder, file, kept],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None and program.stdout.readline() == "ready\n"
        assert (folder / "lease.json").exists() and file.exists(), "not before"
        if killed:
            program.kill()
    eventually(lambda: not folder.exists() and not file.exists(), "its files are removed")
    assert kept.exists()

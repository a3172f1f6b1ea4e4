"""Removes a process's files with leases when it dies, also by kill -9: a small process waits for that.

It serves all leases of a program that lives long, such as a Jupyter server. It starts with the first file, and ends
with the program.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from pathlib import Path

from jupyter_gpupool.core import processes

_lock = threading.Lock()
_process: subprocess.Popen[bytes] | None = None
_started_by = 0


def remove_at_end(path: Path) -> None:
    """Have a file or a folder removed once this process has ended, however it ends; if that is possible here."""
    _tell("remove", path)


def forget(path: Path) -> None:
    """Note that it is gone: the name may become another file's."""
    if _started_by == os.getpid():
        _tell("forget", path)


def _tell(what: str, path: Path) -> None:
    global _process, _started_by
    with _lock, contextlib.suppress(OSError):
        if _started_by != os.getpid():  # none yet, or that of the process that forked this one
            _started_by = os.getpid()
            _process = subprocess.Popen(
                processes.command("jupyter_gpupool.client.file_cleaner_process"),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # it outlives the group of the program
            )
        if _process is not None and _process.stdin is not None:
            _process.stdin.write(json.dumps([what, str(path)]).encode() + b"\n")
            _process.stdin.flush()

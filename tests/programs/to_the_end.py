"""Runs a program to its end, or says what it has printed until it seemed to hang."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_to_the_end(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], patience_s: float = 900.0
) -> str:
    """What the command prints in ``folder``.

    Raises AssertionError with its output if it fails, or if it has not ended after that time; then nothing of it runs
    on, nor of what it has started.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:

        def said(limit: int | None = None) -> str:
            return "".join(text[-limit:] if limit else text for text in (_read(out), _read(log)))

        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = process.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {patience_s:g} s:\n{said(6000)}") from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert code == 0, said(6000)
        return _read(out)


def _read(file: object) -> str:
    file.seek(0)  # type: ignore[attr-defined]
    return str(file.read())  # type: ignore[attr-defined]

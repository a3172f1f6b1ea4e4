"""uv, which resolves versions: that of the PATH, or one in an environment that is removed again."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def resolver() -> Iterator[list[str]]:
    """Give the command of uv. Raises CalledProcessError where it cannot be installed."""
    if uv := shutil.which("uv"):
        yield [uv]
        return
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, "bin", "python"))
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
        yield [python, "-m", "uv"]

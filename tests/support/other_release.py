"""An interpreter that says that its PyTorch is of another release, and is the tests' own in truth."""

from __future__ import annotations

import os
import sys
from pathlib import Path

#: A release that no worker here has.
OTHER = "2.99.1"
_ROOT = Path(__file__).parents[2]


def packages(folder: Path) -> str:
    """A path of modules with which PyTorch says that it is of that release."""
    about = folder / "packages" / f"torch-{OTHER}.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {OTHER}+cu130\n")
    return os.pathsep.join(
        filter(None, [str(folder / "packages"), str(_ROOT), os.environ.get("PYTHONPATH", "")])
    )


def interpreter(folder: Path) -> str:
    """An interpreter with those modules; its processes have the variable OF_OTHER."""
    return script(
        folder / "python", f"PYTHONPATH='{packages(folder)}' OF_OTHER=yes exec '{sys.executable}' \"$@\""
    )


def script(path: Path, text: str) -> str:
    """An executable file."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)

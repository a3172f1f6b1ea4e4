"""What runs in the process that removes files; see :mod:`.file_cleaner`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys


def main() -> None:
    """Read what to remove until the program's end closes the pipe, and remove it."""
    paths: set[str] = set()
    for line in sys.stdin.buffer:
        with contextlib.suppress(ValueError):  # cut off by the program's end
            what, path = json.loads(line)
            (paths.add if what == "remove" else paths.discard)(path)
    for path in paths:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(path)


if __name__ == "__main__":
    main()

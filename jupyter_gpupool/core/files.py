"""Files that are replaced as a whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomically(path: str | Path, data: str | bytes, mode: int = 0o600) -> None:
    """Write ``data`` (text as UTF-8) to ``path``; a reader sees the old content or the new one, never a part.

    The draft beside it has a random name and is created exclusively, so in a directory where others may write
    nobody can put a file or a link in its place. Raises OSError; then the old content stays and no draft is left.
    """
    path = Path(path)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            # A draft is made with mode 0600, and a worker in its sandbox may change no file's mode.
            # Elsewhere the folder's rights apply, which a home keeps to its user.
            if mode != 0o600 and hasattr(os, "fchmod"):
                os.fchmod(f.fileno(), mode)
            f.write(data.encode() if isinstance(data, str) else data)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise

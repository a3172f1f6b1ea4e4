"""What a worker uses inside its sandbox in place of what it can no longer reach."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .layers import FILES, MOUNTS

#: The variables that name a folder for files of short life, with the one in the worker's own directory.
_FOLDERS = {"TMPDIR": ".", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def prepare(
    own: Path,
    listener: socket.socket,
    missing: Mapping[str, str],
    with_programs: bool,
    helper: socket.socket | None = None,
) -> None:
    """Set this process up for a sandbox that lacks these layers. ``listener``: where it receives connections.

    ``with_programs``: it may start programs; otherwise ``helper`` is where another process compiles graphs for it, if
    there is one.
    """
    if not with_programs:
        # Not before PyTorch was found to be there.
        from jupyter_gpupool.pytorch.worker import compile_helper, graph_fusion

        if helper is not None:
            graph_fusion.ask(compile_helper.CompileHelper(helper, own / "compiled"))
        else:
            graph_fusion.refuse("the worker's sandbox starts no compiler")
    if listener.type == socket.SOCK_DGRAM:
        # It only receives. Otherwise it could send to the sockets of other workers, whatever it may connect to.
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_WR)
    if not missing[FILES] or not missing[MOUNTS]:
        use(own)


def use(own: Path) -> None:
    """Have this process write files of short life to its own directory."""
    os.environ.update({name: str(own / folder) for name, folder in _FOLDERS.items()})
    tempfile.tempdir = None  # it may have been chosen before the fork

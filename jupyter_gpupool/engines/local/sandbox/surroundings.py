"""What a worker uses inside its sandbox in place of what it can no longer reach."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .layers import FILES, SYSTEM_CALLS

#: The variables that name a folder for files of short life, with the one in the worker's own directory.
_FOLDERS = {"TMPDIR": ".", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def prepare(own: Path, listener: socket.socket, missing: Mapping[str, str], real: bool) -> None:
    """Set this process up for a sandbox that lacks these layers. ``listener``: where it receives connections.

    ``real``: it uses a GPU that is not emulated.
    """
    if not missing[SYSTEM_CALLS] and not real:
        from jupyter_gpupool.pytorch.worker import graph_fusion  # not before PyTorch was found to be there

        graph_fusion.refuse("the sandbox of a worker with emulated GPUs starts no compiler")
    if listener.type == socket.SOCK_DGRAM:
        # It only receives. Otherwise it could send to the sockets of other workers, whatever it may connect to.
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_WR)
    if not missing[FILES]:
        os.environ.update({name: str(own / folder) for name, folder in _FOLDERS.items()})
        tempfile.tempdir = None  # it may have been chosen before the fork

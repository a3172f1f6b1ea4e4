"""The worker's end of its compile helper, see compile_server.py: asks for compiled graphs, and loads them."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from jupyter_gpupool.pytorch.torch_internals.worker import cpu_runner, cuda_runner

from . import compile_messages as messages
from .graph_module import module_of
from .graph_steps import GraphSteps

#: Beyond what the helper takes for a graph: to start, and to send what it has made; in seconds.
_MORE_S = 60


class NotCompiled(Exception):
    """There is no compiled code of a graph; the message is the reason."""


class CompileHelper:
    """``sock``: what the helper answers at; it is started by the first byte. ``folder``: where products are kept."""

    def __init__(self, sock: socket.socket, folder: Path) -> None:
        self._sock: socket.socket | None = sock
        self._folder = folder
        self._asking = threading.Lock()
        self._count = 0
        self._has_complained = False

    def compiled(
        self, graph: GraphSteps, loading: contextlib.AbstractContextManager[Any]
    ) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
        """Return what runs the graph. Raises NotCompiled, and says so once in the worker's log.

        ``loading`` is entered while compiled code is loaded.
        """
        try:
            module_of(graph)  # before anybody is asked
            with self._asking:
                files = self._ask(graph)
                self._count += 1
                folder = self._folder / str(self._count)
            with loading:
                return _loaded(files, folder, graph.device.torch_device)
        except Exception as e:  # of a message, a file, the loader: without compiled code the operators run
            why = str(e) or type(e).__name__
        if not self._has_complained:
            self._has_complained = True
            print(
                f"gpupool worker: a graph is not compiled, and its operators run one by one: {why}",
                file=sys.stderr,
                flush=True,
            )
        raise NotCompiled(why)

    def _ask(self, graph: GraphSteps) -> dict[str, bytes]:
        sock = self._sock
        if sock is None:
            raise messages.BadMessage("the compile helper has ended")
        asked = {
            "definition": graph.definition,
            "device": str(graph.device.torch_device),
            "threads": torch.get_num_threads(),
        }
        try:
            sock.settimeout(messages.TIME_LIMIT_S + _MORE_S)
            messages.send(sock, asked)
            answer = messages.receive(sock, messages.MAX_PRODUCT_BYTES)
        except Exception as e:
            # What comes late would be taken for the answer to another question.
            self._sock = None
            sock.close()
            raise messages.BadMessage(f"the compile helper does not answer: {e}") from None
        return messages.products(answer)


def _loaded(
    files: dict[str, bytes], folder: Path, device: torch.device
) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
    """Load the products, which need ``folder``. Raises OSError and RuntimeError."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    library = str(folder / messages.LIBRARY)
    if device.type != "cpu":
        # Its kernels are read from there when they are first used.
        runner = cuda_runner.get()(library, 1, str(device), str(folder))
    else:
        runner = cpu_runner.get()(library, 1)
        shutil.rmtree(folder, ignore_errors=True)
    return lambda tensors: list(runner.run(list(tensors)))

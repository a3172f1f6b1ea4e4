"""Run a public script as ``python SCRIPT ARGUMENTS`` does, so that two runs of it can be compared.

Both runs get the same seeds. Four options help scripts for which that is not enough:

``--on-device DEVICE``: tensors of a script that names no device are made there.
``--draws-on-cpu``: random numbers come from the CPU's generator on either device. The CPU has one generator where a
program with a GPU has two, so a script that draws from both never draws the same numbers on the CPU. Dropout within
nn.LSTM and its kind, which is part of one operator, stays as it is.
``--in-order``: data is loaded in order and in one process, for scripts that shuffle only where they have a GPU.
``--download FILE``: what ``requests.get`` returns.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import io
import random
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class DrawsOnCpu(TorchDispatchMode):
    """Operators that draw random numbers for a GPU compute on the CPU, and their results are copied to the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        device = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu"))
        if torch.Tag.nondeterministic_seeded not in func.tags or device.type != "cuda":
            return func(*args, **kwargs)
        copies = {id(tensor): tensor.cpu() for tensor in tensors}
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: copies[id(tensor)], (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        drawn = func(*args, **kwargs)
        if func._schema.is_mutable:  # in place, or into out=
            for tensor in tensors:
                tensor.copy_(copies[id(tensor)])
        written = {id(copies[id(tensor)]): tensor for tensor in tensors}
        return tree_map_only(
            torch.Tensor, lambda out: written[id(out)] if id(out) in written else out.to(device), drawn
        )


def load_in_order() -> None:
    """Let every DataLoader give its data in order, and load it in this process."""
    before = torch.utils.data.DataLoader.__init__

    @functools.wraps(before)
    def in_order(self: Any, *args: Any, **kwargs: Any) -> None:
        alike = {"shuffle": False, "num_workers": 0, "persistent_workers": False}
        before(self, *args, **{**kwargs, **alike})

    torch.utils.data.DataLoader.__init__ = in_order  # type: ignore[method-assign]


def serve(file: Path) -> None:
    import requests

    class Answer(SimpleNamespace):
        def __enter__(self) -> Answer:
            return self

        def __exit__(self, *error: object) -> None:
            self.raw.close()

    requests.get = lambda *arguments, **options: Answer(raw=io.BytesIO(file.read_bytes()))  # type: ignore[assignment]


def report_peak() -> None:
    """Name the most GPU memory that this process held: the proof that the script used the GPU."""
    if torch.cuda.is_available():
        print(f"peak of the GPU: {torch.cuda.max_memory_allocated()} bytes", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on-device", default="")
    parser.add_argument("--draws-on-cpu", action="store_true")
    parser.add_argument("--in-order", action="store_true")
    parser.add_argument("--download", type=Path)
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.in_order:
        load_in_order()
    if options.download:
        serve(options.download)
    atexit.register(report_peak)
    random.seed(0)
    torch.manual_seed(0)
    if options.on_device:
        torch.set_default_device(options.on_device)
    if options.draws_on_cpu:
        DrawsOnCpu().__enter__()
    sys.argv = [str(options.script), *options.arguments]
    sys.path[0] = str(options.script.resolve().parent)
    runpy.run_path(str(options.script), run_name="__main__")


if __name__ == "__main__":
    main()

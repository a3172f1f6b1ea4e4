"""Run a public script as ``python SCRIPT ARGUMENTS`` does, so that two runs of it can be compared.

Both runs get the same seeds. Four options help scripts for which that is not enough:

``--on-device DEVICE``: tensors of a script that names no device are made there.
``--draws-on-cpu``: random numbers come from the CPU's generator on either device. The CPU has one generator where a
program with a GPU has two, so a script that draws from both never draws the same numbers on the CPU.
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
from torch.overrides import TorchFunctionMode

_MAKERS = {torch.rand, torch.randn, torch.randint, torch.randperm}
_LIKE = {
    torch.rand_like,
    torch.randn_like,
    torch.bernoulli,
    torch.multinomial,
    torch.nn.functional.dropout,
    torch.nn.functional.dropout1d,
    torch.nn.functional.dropout2d,
}
_IN_PLACE = {torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.bernoulli_, torch.Tensor.exponential_}
_INITIALISERS = {torch.nn.init.normal_, torch.nn.init.uniform_}


class DrawsOnCpu(TorchFunctionMode):
    """Random numbers are drawn on the CPU and copied to where they were asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MAKERS:
            device = kwargs.pop("device", None) or torch.get_default_device()
            return func(*args, device="cpu", **kwargs).to(device)
        if func in _LIKE and args[0].device.type != "cpu":
            return func(args[0].cpu(), *args[1:], **kwargs).to(args[0].device)
        if func in _IN_PLACE and args[0].device.type != "cpu":
            return args[0].copy_(func(torch.empty_like(args[0], device="cpu"), *args[1:], **kwargs))
        if func in _INITIALISERS:
            tensor = kwargs.pop("tensor") if "tensor" in kwargs else args[0]
            drawn = func(torch.empty_like(tensor, device="cpu"), *args[1:], **kwargs)
            with torch.no_grad():
                return tensor.copy_(drawn)
        return func(*args, **kwargs)


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

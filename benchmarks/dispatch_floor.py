"""What PyTorch itself costs a device that is written in Python: the floor of ``__torch_dispatch__``.

An addition of two tensors of a subclass that does nothing: it returns a tensor that it has already, or makes one of
PyTorch's wrappers for the result. A device in Python costs at least the second. Where there is a C++ compiler, the same
of a device in C++ that does what the client does, but sends nothing: dispatch_floor.cpp.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

OPERATORS = 5_000
ROUNDS = 15
_SOURCE = Path(__file__).with_suffix(".cpp")


def _made(kind: type[torch.Tensor]) -> Any:
    make: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
    return make(kind, (4, 4), dtype=torch.float32, device="cpu")


class ReturnsOne(torch.Tensor):
    """Returns one of its arguments: what entering Python costs."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0]


class MakesOne(torch.Tensor):
    """Makes a wrapper for the result."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _made(cls)


def run() -> dict[str, Any]:
    """Return µs for an addition, and the medians of their ratios to a local one, round by round."""
    compiler = shutil.which("g++") or shutil.which("c++")
    with tempfile.TemporaryDirectory() as folder:
        library = _compiled(compiler, Path(folder)) if compiler else ""
        # In a process of its own: a library cannot be unloaded, and the device is another one's here.
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.dispatch_floor", library],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    figures: dict[str, Any] = dict(word.split("=") for word in done.stdout.split())
    return {name: float(value) for name, value in figures.items()}


def _compiled(compiler: str, folder: Path) -> str:
    home = Path(torch.__file__).parent
    library = folder / "dispatch_floor.so"
    include = [f"-I{home / 'include'}", f"-I{home / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    link = [f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(
        [
            compiler,
            "-O2",
            "-std=c++20",
            "-shared",
            "-fPIC",
            *include,
            str(_SOURCE),
            *link,
            "-o",
            str(library),
        ],
        check=True,
    )
    return str(library)


def main() -> None:
    """Measure, and print NAME=VALUE. The argument is the compiled library, or empty."""
    torch.set_num_threads(1)
    local = torch.ones(4, 4)
    sides: dict[str, Any] = {
        "local": local,
        "returns_one": _made(ReturnsOne),
        "makes_one": _made(MakesOne),
    }
    if sys.argv[1]:
        torch.ops.load_library(sys.argv[1])
        sides["compiled"] = torch.ops.gpupool_floor.made()
    rounds = [{name: _cost(lambda x=x: x + x) for name, x in sides.items()} for _ in range(ROUNDS + 1)][1:]
    for name in sides:
        print(f"{name}_us={statistics.median(one[name] for one in rounds):.2f}")
        if name != "local":
            ratio = statistics.median(one[name] / one["local"] for one in rounds)
            print(f"{name}_to_local={ratio:.2f}")


def _cost(operator: Callable[[], Any]) -> float:
    began = time.perf_counter()
    for _ in range(OPERATORS):
        operator()
    return (time.perf_counter() - began) / OPERATORS * 1e6


if __name__ == "__main__":
    main()

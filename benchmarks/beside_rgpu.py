"""The same programs on a leased slice and on rgpu's device, a server on this CPU and one thread each, in turns.

rgpu sends PyTorch's operators to another machine, too. Both rename the same device of
PyTorch's, so each runs in a process of its own; a round asks one after the other for the same work.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .missing import Missing
from .mnist_step import Standard

#: rgpu's time ÷ ours: above 1, ours is faster.
GOALS = {
    "async_operator": (">=", 1.0),
    "mnist_step": (">=", 1.0),
    "tiny_training_step": (">=", 1.0),
    "item": (">=", 1.0),
}

ROUNDS = 15
_START_TIMEOUT_S = 120.0

Work = Callable[[], float]


def run() -> dict[str, Any]:
    """Return for each program the medians in µs, and the median of rgpu's time ÷ ours by rounds."""
    if importlib.util.find_spec("rgpu") is None:
        raise Missing(
            "rgpu is not installed; it needs PyTorch 2.14 or later: pip install rgpu==0.1.1, in that environment"
        )
    with _server() as address, _child("gpupool", "") as ours, _child("rgpu", address) as theirs:
        names = list(PROGRAMS)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for round_ in range(ROUNDS + 1):
            for name in names:
                pair = (ours(name), theirs(name)) if round_ % 2 else (theirs(name), ours(name))[::-1]
                if round_:  # the first warms up
                    times[name].append(pair)
    figures: dict[str, Any] = {"rgpu": importlib.metadata.version("rgpu")}
    for name, pairs in times.items():
        figures[name] = round(statistics.median(b / a for a, b in pairs), 2)
    figures["us"] = {
        name: {
            "gpupool": round(statistics.median(a for a, _ in pairs), 1),
            "rgpu": round(statistics.median(b for _, b in pairs), 1),
        }
        for name, pairs in times.items()
    }
    return figures


# -- the programs, each of which returns µs


def _async_operator(device: str) -> Work:
    """An addition of 4 × 4 elements, until the program goes on; 500 of them, then a wait."""
    x = torch.ones(4, 4, device=device)

    def work() -> float:
        began = time.perf_counter()
        for _ in range(500):
            y = x + x
        issued = time.perf_counter()
        y[0, 0].item()
        return (issued - began) / 500 * 1e6

    return work


def _training(device: str, model: nn.Module, x: Any, y: Any, steps: int) -> Work:
    network, x, y = model.to(device), x.to(device), y.to(device)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)

    def work() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
        loss.item()
        return (time.perf_counter() - began) / steps * 1e6

    return work


def _mnist_step(device: str) -> Work:
    """A step of PyTorch's MNIST example, 64 images, by the mean of 4."""
    return _training(device, Standard(), torch.randn(64, 1, 28, 28), torch.arange(64) % 10, 4)


def _tiny_training_step(device: str) -> Work:
    """A step of 40 layers of 16, by the mean of 10."""
    layers = [part for _ in range(40) for part in (nn.Linear(16, 16), nn.ReLU())]
    return _training(device, nn.Sequential(*layers), torch.randn(8, 16), torch.arange(8), 10)


def _item(device: str) -> Work:
    """A lone ``.item()``: one question and its answer, by the median of 200."""
    x = torch.ones(4, 4, device=device)
    cell = x[0, 0]

    def work() -> float:
        found = []
        for _ in range(200):
            began = time.perf_counter()
            cell.item()
            found.append((time.perf_counter() - began) * 1e6)
        return statistics.median(found)

    return work


PROGRAMS: dict[str, Callable[[str], Work]] = {
    "async_operator": _async_operator,
    "mnist_step": _mnist_step,
    "tiny_training_step": _tiny_training_step,
    "item": _item,
}

# -- the processes


@contextlib.contextmanager
def _server() -> Iterator[str]:
    """rgpu's server on this CPU, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rgpu.server", "--device", "cpu", "--port", str(port)]
    server = subprocess.Popen(
        command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise Missing("rgpu's server does not start; try: rgpu-opserver --device cpu") from None
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def _child(library: str, address: str) -> Iterator[Callable[[str], float]]:
    """A process with that library's device: a function that asks it for a program's time."""
    environment = {**_environment(), **({"RGPU_OPSERVER": address} if address else {})}
    command = [sys.executable, "-m", "benchmarks.beside_rgpu", library]
    child = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None and child.stdout is not None

    def ask(name: str) -> float:
        assert child.stdin is not None and child.stdout is not None
        print(name, file=child.stdin, flush=True)
        return float(json.loads(child.stdout.readline()))

    try:
        yield ask
    finally:
        child.stdin.close()
        child.wait()


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _answer(device: str) -> None:
    torch.manual_seed(0)
    programs = {name: program(device) for name, program in PROGRAMS.items()}
    for line in sys.stdin:
        print(json.dumps(programs[line.strip()]()), flush=True)


def main() -> None:
    """One of the two processes: a program's name on each line in, its µs on each line out."""
    torch.set_num_threads(1)
    if sys.argv[1] == "rgpu":
        importlib.import_module("rgpu")
        _answer("rgpu")
        return
    import jupyter_gpupool

    with jupyter_gpupool.attach(num_gpus=1, partial=0.5):
        _answer("cuda")


if __name__ == "__main__":
    main()

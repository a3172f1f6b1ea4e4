"""A tenant's program for tenants.py: it holds a slice, and computes on it. Its argument says what it does.

``steady`` times an operator and its result, again and again; ``memory`` asks for more host memory than its worker may
have; ``graphs`` has graphs of thousands of operators compiled, each once. It prints a line once it is attached, ends
when its input does, and prints ``[[when it ended, seconds it took]]`` of its operators.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable

import torch

from jupyter_gpupool import attach

#: What a step asks for, in MiB: more than the worker's host memory, less than its slice.
TOO_MUCH_MIB = 6000
GRAPH_OPERATORS = 2000


def _steady() -> None:
    (x @ x).sum().item()


def _memory() -> None:
    try:
        torch.ones(TOO_MUCH_MIB << 18, device="cuda").sum().item()
    except torch.OutOfMemoryError:
        return
    raise AssertionError("the worker had that much host memory")


def _graphs() -> None:
    count = next(numbers)

    def many(y: torch.Tensor) -> torch.Tensor:
        for k in range(GRAPH_OPERATORS):
            y = y + (count + k)
        return y

    torch._dynamo.reset()
    torch.compile(many, backend="gpupool")(x).sum().item()


STEPS: dict[str, Callable[[], None]] = {"steady": _steady, "memory": _memory, "graphs": _graphs}

if __name__ == "__main__":
    step = STEPS[sys.argv[1]]
    numbers = iter(range(1 << 30))
    calls = []
    with attach(memory_mib=int(sys.argv[2])):
        x = torch.ones(64, 64, device="cuda")
        x.sum().item()
        over = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
        print("attached", flush=True)
        while not over.is_set():
            began = time.perf_counter()
            step()
            calls.append((time.time(), time.perf_counter() - began))
            if sys.argv[1] == "steady":
                over.wait(0.01)
    print(json.dumps(calls))

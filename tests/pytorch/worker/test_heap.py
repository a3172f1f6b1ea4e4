"""The heap of an emulated GPU keeps its pages, so training causes no page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="the memory is a tensor's")

FAULTS = """
import resource, sys, torch
from jupyter_gpupool.pytorch.worker.heap import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    tensors = [torch.ones(size) for size in (3 << 18, 5 << 18, 40 << 18)]
    del tensors

for _ in range(20):
    step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""


def faults(heap: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, heap], capture_output=True, text=True, check=True, timeout=300
    )
    return int(done.stdout)


def test_freed_memory_is_used_again_without_page_faults() -> None:
    assert faults("kept") * 4 < faults("by default")

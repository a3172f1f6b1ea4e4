"""The process that workers are forked from."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="workers run PyTorch")

WARM_UP = """
import os, time, torch
from jupyter_gpupool.engines.local.zygote import _warm_up

def threads():
    return len(os.listdir("/proc/self/task"))

before = threads(), torch.get_num_threads(), torch.get_rng_state()
_warm_up(torch)
deadline = time.monotonic() + 60
while threads() != before[0] and time.monotonic() < deadline:
    time.sleep(0.01)  # a thread that has been joined may be listed for a moment
print(threads() == before[0], torch.get_num_threads() == before[1], torch.equal(torch.get_rng_state(), before[2]))
network = torch.nn.LSTM(64, 64, 2)
pid = os.fork()
if pid == 0:
    network(torch.ones(35, 8, 64))[0].sum().backward()
    os._exit(0 if network.weight_ih_l0.grad is not None else 1)
print(os.waitpid(pid, 0)[1])
"""


def test_the_warm_up_leaves_no_thread_and_no_random_state_and_forks_can_train() -> None:
    ended = subprocess.run([sys.executable, "-c", WARM_UP], capture_output=True, text=True, timeout=300)
    assert ended.stdout.split() == ["True", "True", "True", "0"], ended.stderr

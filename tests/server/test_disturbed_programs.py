"""Programs that take turns on too few GPUs, while their pool, keepers, workers and neighbours are killed at random.

Each program computes what it computes undisturbed, digit for digit, or has lost its lease and says so in one line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_core.paths import jupyter_runtime_dir

from jupyter_gpupool.core.models import LeaseState

from ..conftest import PATIENCE_S, often
from ..support.ports import free_port
from ..support.processes import command_line
from .conftest import Pool

STRIKES = often(5, 300)
#: One more than there are GPUs, so that one of them is parked or waits at any time.
PROGRAMS = 3
OPTIONS = (
    "--persistent",
    "--PoolService.ttl_s=600",
    "--PoolService.reclaim=idle",
    "--PoolService.reclaim_after_s=0",
    "--PoolService.min_resident_s=0",
    "--LocalEngine.park_memory_mib=256",
)
#: Waits until it is told to go on; trains with momentum and dropout, and rests at random, so that it may be parked.
#: The seed of its rests is its own.
PROGRAM = """
import hashlib, json, random, sys, threading
import jupyter_gpupool, torch
from torch import nn
torch.set_num_threads(1)
lease = jupyter_gpupool.attach(num_gpus=1, partial=1.0)
torch.zeros(1, device="cuda")
print(lease.id, flush=True)
sys.stdin.readline()
chance, rest = random.Random(sys.argv[1]), threading.Event()
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)).cuda()
optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
losses = []
for step in range(int(sys.argv[2])):
    x, y = torch.randn(32, 64, device="cuda"), torch.randint(10, (32,), device="cuda")
    loss = nn.functional.cross_entropy(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    rest.wait(chance.random() * 0.1)
state = b"".join(p.detach().cpu().numpy().tobytes() for p in net.parameters())
print(json.dumps([losses, hashlib.sha256(state).hexdigest()]), flush=True)
"""
STEPS = often(60, 200)


@dataclass
class Program:
    process: subprocess.Popen[str]
    lease_id: str
    #: what was killed that it cannot go on without
    suffered: set[str] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None


class Farm:
    """A pool, its programs, and what happens to them."""

    def __init__(self, start_pool: Callable[..., Pool], eventually: Callable[..., Any]) -> None:
        self._port, self._start_pool, self._eventually = free_port(), start_pool, eventually
        self.chance = random.Random(STRIKES)
        self.pool = start_pool(*OPTIONS, port=self._port)
        self.programs: list[Program] = []
        self.outcomes: Counter[str] = Counter()
        #: how many leases were parked when programs had just been started
        self.gave_way = 0
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, number: int) -> list[Program]:
        """Start programs, and let them go on once each of them has its lease."""
        processes = []
        for _ in range(number):
            seed = str(len(self.processes))
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, seed, str(STEPS)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            self.processes.append(processes[-1])
        started = []
        for process in processes:
            assert process.stdout is not None and process.stderr is not None
            lease_id = process.stdout.readline().strip()
            assert lease_id, process.stderr.read()
            started.append(Program(process, lease_id))
        self.gave_way += sum(one.state is LeaseState.PARKED for one in self.pool.client.leases())
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return started

    def refill(self) -> None:
        self.programs += self.start(PROGRAMS - len(self.programs))

    def settle(self, expected: str) -> None:
        """Look at the programs that are over: each was right, or lost its lease in one line."""
        for one in [program for program in self.programs if program.is_over]:
            self.programs.remove(one)
            self.judge(one, expected)

    def judge(self, one: Program, expected: str) -> None:
        said, complaint = one.process.communicate(timeout=PATIENCE_S)
        if "program" in one.suffered:
            self.outcomes["killed"] += 1
            return
        if one.process.returncode == 0:
            assert said.strip() == expected, "a program computed something else"
            self.outcomes["undisturbed" if not one.suffered else "whole all the same"] += 1
            return
        assert one.suffered == {"worker"}, complaint
        last = complaint.strip().splitlines()[-1]
        assert "its tensors are lost" in last or "ended" in last, complaint
        lease = self._eventually(
            lambda: (found := self.pool.client.lease(one.lease_id)).state.ended and found, "its lease ends"
        )
        assert lease.state in (LeaseState.LOST, LeaseState.RELEASED), lease
        assert lease.reason and "\n" not in lease.reason
        self.outcomes["lost"] += 1

    def strike(self) -> str:
        """Kill something. Return what."""
        running = [one for one in self.programs if not one.is_over]
        what = self.chance.choice(["pool", "keeper", "worker", "program"])
        if what == "pool":
            self.pool.process.kill()
            self.pool.process.wait()
            self.pool = self._start_pool(*OPTIONS, port=self._port)
        elif running:
            one = self.chance.choice(running)
            if what == "keeper":
                for keeper in keepers(one.process.pid):
                    with suppress(psutil.NoSuchProcess):
                        keeper.kill()
            elif what == "worker":
                for pid in workers(one.lease_id):
                    one.suffered.add(what)
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            else:
                one.suffered.add(what)
                one.process.kill()
        return what


def keepers(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return [
            child
            for child in psutil.Process(pid).children()
            if "jupyter_gpupool.client.keeper_process" in command_line(child)
        ]
    return []


def workers(lease_id: str = "") -> list[int]:
    """The processes of a lease's worker, or of all leases' workers, as their files name them."""
    found = []
    for file in (Path(jupyter_runtime_dir()) / "gpupool").glob("workers-*/*.json"):
        with suppress(OSError, ValueError, psutil.Error):
            state = json.loads(file.read_text())
            if "code" in state or lease_id not in ("", state["lease"]):
                continue
            if psutil.Process(state["pid"]).status() != psutil.STATUS_ZOMBIE:
                found.append(state["pid"])
    return found


@pytest.fixture
def farm(start_pool: Callable[..., Pool], eventually: Callable[..., Any]) -> Iterator[Farm]:
    farm = Farm(start_pool, eventually)
    yield farm
    for process in farm.processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            stream.close()


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_whole_or_lost_in_one_line(farm: Farm, eventually: Callable[..., Any]) -> None:
    (alone,) = farm.start(1)
    expected, complaint = alone.process.communicate(timeout=PATIENCE_S)
    assert alone.process.returncode == 0, complaint
    farm.refill()
    assert farm.gave_way, "there are more programs than GPUs"
    struck: Counter[str] = Counter()
    pause = threading.Event()
    while sum(struck.values()) < STRIKES:
        farm.refill()
        pause.wait(farm.chance.random())  # when to strike is chance; nothing below depends on it
        struck[farm.strike()] += 1
        farm.settle(expected.strip())
    farm.programs += farm.start(1)  # nothing strikes this one
    for one in farm.programs:
        one.process.wait(10 * PATIENCE_S)
    farm.settle(expected.strip())
    print(dict(struck), dict(farm.outcomes))
    assert farm.outcomes["undisturbed"], "nothing was computed"
    eventually(lambda: sum(farm.pool.granted_mib()) == 0, "every share comes back")
    eventually(lambda: not workers(), "no worker is left")
    assert not [lease for lease in farm.pool.client.leases() if not lease.state.ended]

"""A program that attached itself keeps its lease while it cannot answer, and loses it when it dies."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

import jupyter_gpupool
from jupyter_gpupool.client import lease_holder
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.models import Lease, LeaseState

from ..support.processes import command_line, runs
from ..support.user_pool import UserPool

pytest.importorskip("torch", reason="leases are for PyTorch programs")

#: Long enough for those that wait in the queue on a busy machine.
TTL_S = 10.0
#: A call that holds the interpreter's lock for more than twice the lease's TTL.
BUSY = "import ctypes; ctypes.PyDLL(None).sleep(21)"
PROGRAM = """
import sys
import jupyter_gpupool, torch
lease = jupyter_gpupool.attach({arguments})
x = torch.arange(4.0, device="cuda")
print(lease.id, flush=True)
for line in sys.stdin:
    exec(line)
    print(x.sum().item(), flush=True)
"""


@pytest.fixture(scope="module")
def quick_pool() -> Iterator[UserPool]:
    pool = UserPool(f"--PoolService.ttl_s={TTL_S}")
    yield pool
    pool.stop()


@pytest.fixture
def pool(jupyter_home: Any, quick_pool: UserPool) -> Iterator[PoolClient]:
    with quick_pool.publish() as client:
        yield client
    quick_pool.end_leases()


@pytest.fixture
def program(pool: PoolClient) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started = []

    def start(arguments: str = "memory_fraction=0.5") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(arguments=arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def run(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def keeper_of(process: subprocess.Popen[str]) -> psutil.Process:
    (found,) = [
        child
        for child in psutil.Process(process.pid).children()
        if "jupyter_gpupool.client.keeper_process" in command_line(child)
    ]
    return found


def ended(pool: PoolClient, lease_id: str) -> Lease | None:
    lease = pool.lease(lease_id)
    return lease if lease.state.ended else None


def test_a_call_that_holds_the_interpreter_loses_nothing(pool: PoolClient, program: Callable) -> None:
    process = program()
    lease_id = process.stdout.readline().strip()
    assert run(process, BUSY) == "6.0"
    assert pool.lease(lease_id).state is LeaseState.ACTIVE


def test_a_program_that_is_stopped_loses_nothing(
    pool: PoolClient, program: Callable, eventually: Callable
) -> None:
    process = program()
    lease_id = process.stdout.readline().strip()
    process.send_signal(signal.SIGSTOP)
    began = pool.lease(lease_id).heartbeat_at
    eventually(lambda: pool.lease(lease_id).heartbeat_at > began + 2 * TTL_S, "the keeper sends heartbeats")
    process.send_signal(signal.SIGCONT)
    assert run(process, "pass") == "6.0"


def test_a_program_that_is_killed_loses_its_lease_and_its_keeper(
    pool: PoolClient, program: Callable, eventually: Callable
) -> None:
    process = program()
    lease_id = process.stdout.readline().strip()
    keeper = keeper_of(process)
    process.kill()
    lease = eventually(lambda: ended(pool, lease_id), "the lease ends")
    assert (lease.state, lease.reason) == (LeaseState.RELEASED, "its holder went away")
    eventually(lambda: not runs(keeper), "the keeper ends")


def test_a_program_that_is_killed_leaves_the_queue(
    pool: PoolClient, program: Callable, eventually: Callable
) -> None:
    holder = program("num_gpus=2")
    holder.stdout.readline()
    waiting = program("num_gpus=2")
    (queued,) = eventually(
        lambda: [lease for lease in pool.leases() if lease.state is LeaseState.QUEUED], "it is queued"
    )
    # The program has the pool's answer, so its keeper knows of the lease.
    eventually(lambda: pool.lease(queued.id).heartbeat_at > queued.heartbeat_at, "it sends heartbeats")
    first = pool.lease(queued.id).heartbeat_at
    waiting.send_signal(signal.SIGSTOP)
    eventually(lambda: pool.lease(queued.id).heartbeat_at > first + 2 * TTL_S, "its keeper waits for it")
    waiting.kill()
    lease = eventually(lambda: ended(pool, queued.id), "it leaves the queue")
    assert lease.state is LeaseState.CANCELLED


def test_a_program_that_is_killed_before_its_keeper_runs(
    pool: PoolClient, program: Callable, eventually: Callable
) -> None:
    before = {lease.id for lease in pool.leases(include_ended=True)}
    program("on_update=lambda lease: __import__('os').kill(__import__('os').getpid(), 9)").wait()
    (lease,) = (lease for lease in pool.leases(include_ended=True) if lease.id not in before)
    ending = eventually(lambda: ended(pool, lease.id), "what it has requested ends")
    assert ending.state in (LeaseState.RELEASED, LeaseState.CANCELLED), ending.reason


@pytest.mark.parametrize("within", ["acquire", "Lifeline", "choose_connection"])
def test_a_program_that_is_interrupted_while_it_attaches(
    pool: PoolClient, monkeypatch: pytest.MonkeyPatch, within: str
) -> None:
    does = getattr(lease_holder, within)

    def interrupted(*words: Any, **options: Any) -> Any:
        done = does(*words, **options)
        signal.raise_signal(signal.SIGINT)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(lease_holder, within, interrupted)
        with pytest.raises(KeyboardInterrupt):
            jupyter_gpupool.attach(memory_fraction=0.5)
    assert pool.leases() == []
    with jupyter_gpupool.attach(memory_fraction=1.0) as lease:
        assert [one.id for one in pool.leases()] == [lease.id]


def test_a_program_goes_on_when_its_keeper_is_killed(
    pool: PoolClient, program: Callable, eventually: Callable
) -> None:
    process = program()
    lease_id = process.stdout.readline().strip()
    keeper = keeper_of(process)
    keeper.kill()
    assert run(process, "pass") == "6.0"
    assert run(process, "lease.release(); x = torch.arange(4.0)") == "6.0"
    assert pool.lease(lease_id).state is LeaseState.RELEASED


def test_a_release_ends_the_keeper(pool: PoolClient, program: Callable) -> None:
    process = program()
    lease_id = process.stdout.readline().strip()
    keeper = keeper_of(process)
    assert run(process, "lease.release(); x = torch.arange(4.0)") == "6.0"
    assert not runs(keeper) and pool.lease(lease_id).state is LeaseState.RELEASED

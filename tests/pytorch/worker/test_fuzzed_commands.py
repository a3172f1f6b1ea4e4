"""Very many commands and states that no client and no worker sends: refused or executed, and all memory comes back."""

from __future__ import annotations

import mmap
import multiprocessing
import random
import secrets
from typing import Any

import msgpack
import pytest

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.engines.local.bounds import own_limits  # noqa: E402
from jupyter_gpupool.pytorch.protocol import commands as codes  # noqa: E402
from jupyter_gpupool.pytorch.worker.lease_state import BadState, Unparkable  # noqa: E402
from jupyter_gpupool.pytorch.worker.templates import BadRecord  # noqa: E402

from ...conftest import often  # noqa: E402
from ...support.mutations import damaged, mutated  # noqa: E402
from ...support.worker_programs import OPERATORS, program  # noqa: E402
from ...support.workplace import Workplace, restore  # noqa: E402

FRAMES = often(10_000, 10_000_000)
STATES = often(500, 100_000)
#: A worker's own bound: operators need memory that no layout tells.
HOST_MEMORY_MIB = 3072
#: How often a command is not as a client would send it.
CHANGED = 0.4
LENGTH = 60
#: These wait for other ranks, for as long as they say.
WAITING = (codes.MEET, codes.TAKE, codes.FETCH)


class Flight:
    """What was tried last, for a process that cannot say it any more."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    def note(self, packed: bytes) -> None:
        self._memory.seek(0)
        self._memory.write(len(packed).to_bytes(4, "big") + packed[: 1 << 20])

    def last(self) -> Any:
        length = int.from_bytes(self._memory[:4], "big")
        return msgpack.unpackb(self._memory[4 : 4 + length], strict_map_key=False)


def try_frames(seed: int, flight: Flight) -> None:
    rng = random.Random(seed)
    place = Workplace()
    tried = 0
    while tried < FRAMES:
        first, commands = program(rng, LENGTH)
        prefix = secrets.token_bytes(8)
        for who in "ab":
            place.new_session(who)
        for k, (who, *command) in enumerate((*first, *commands)):
            if who not in place.sessions:
                continue
            # Names are random, and nobody has another's.
            command = [prefix + f[8:] if isinstance(f, bytes) and len(f) == 16 else f for f in command]
            if k >= len(first) and rng.random() < CHANGED:
                command = mutated(rng, command, OPERATORS)
            try:
                packed = msgpack.packb(command)
            except OverflowError:  # a number that no frame can say
                continue
            if (
                isinstance(command, list)
                and command
                and command[0] in WAITING
                and command[-1] not in (0, None)
            ):
                continue
            flight.note(packed)
            tried += 1
            try:
                place.execute(who, packed)
            except BadRecord:
                place.sessions.pop(who).close()
        for session in place.sessions.values():
            session.close()
        place.sessions.clear()
        place.answers.clear()
        for device in place.devices:
            place.shared.reclaim(device)
        assert [d.allocated for d in place.devices] == [0, 0]


def try_states(seed: int, flight: Flight) -> None:
    rng = random.Random(seed)
    tried = 0
    while tried < STATES:
        place = Workplace()
        first, commands = program(rng, LENGTH)
        for who in "ab":
            place.new_session(who)
        for command in (*first, *commands):
            place.run(*command)
        try:
            whole = place.stream()
        except Unparkable:
            continue
        for _ in range(50):
            stream = damaged_state(rng, whole)
            flight.note(msgpack.packb(stream))
            tried += 1
            there = Workplace()
            try:
                restore(stream, there)
            except BadState:
                continue
            there.content()
            for who in "ab":
                if who in there.sessions:
                    there.sessions.pop(who).close()


def damaged_state(rng: random.Random, stream: bytes) -> bytes:
    """A stream with other bytes somewhere, or with a description in which something else stands."""
    if rng.random() < 0.3:
        return damaged(rng, stream)
    start = stream.rindex(b"\x04" + bytes(16), 0, len(stream))
    description = msgpack.unpackb(stream[start + 25 :], strict_map_key=False)
    for _ in range(rng.randint(1, 2)):
        description = mutated(rng, description, OPERATORS)
    try:
        packed = msgpack.packb(description)
    except OverflowError:
        return stream
    return stream[: start + 17] + len(packed).to_bytes(8, "big") + packed


def _in_bounds(memory: mmap.mmap, work: Any, seed: int) -> None:
    own_limits.enter({"data_mib": HOST_MEMORY_MIB})
    torch.set_num_threads(1)
    work(seed, Flight(memory))


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("work", [try_frames, try_states])
def test_nothing_breaks(work: Any) -> None:
    """In a process of its own, because a fault in a kernel would end it."""
    memory = mmap.mmap(-1, 2 << 20)
    process = multiprocessing.get_context("fork").Process(target=_in_bounds, args=(memory, work, 7))
    process.start()
    process.join()
    assert process.exitcode == 0, Flight(memory).last()

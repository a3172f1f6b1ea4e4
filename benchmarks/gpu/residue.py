"""Whether a process finds on a GPU what another one has left there: after its end, and after kill -9."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from .measuring import MIB, REMOTE, Setting, started

#: Four bytes that neither a driver nor a library writes.
MARK = 0x5EC12E7
#: What a process takes at once; the last pieces of a card are smaller than that.
_PIECE_MIB = 256

Report = Callable[[str, Any], None]


def take(device: str, mib: int) -> list[torch.Tensor]:
    """Take so much memory as it is, or nearly; 32-bit words."""
    pieces = []
    for _ in range(mib // _PIECE_MIB):
        try:
            pieces.append(torch.empty(_PIECE_MIB * MIB // 4, dtype=torch.int32, device=device))
        except torch.OutOfMemoryError:
            break
    return pieces


def marked(pieces: list[torch.Tensor]) -> int:
    """Return how many words are the mark."""
    return sum(int((piece == MARK).sum().item()) for piece in pieces)


def _fill(device: str, mib: int, said: Any, dies: bool) -> None:
    pieces = take(device, mib)
    for piece in pieces:
        piece.fill_(MARK)
    said.send((len(pieces) * _PIECE_MIB, marked(pieces[-1:])))
    if dies:
        signal.pause()  # until it is killed


def _look(device: str, mib: int, said: Any) -> None:
    pieces = take(device, mib)
    said.send((len(pieces) * _PIECE_MIB, marked(pieces)))


def _in_a_process(
    function: Callable[..., None], device: str, mib: int, *more: bool, kills: bool = False
) -> tuple[int, int]:
    """Run it in a process of its own; return what it says: MiB, and words that are the mark."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=function, args=(device, mib, there, *more))
    process.start()
    there.close()
    try:
        mib, words = here.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"the process ended with exit code {process.exitcode}") from None
    if kills:
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    return mib, words


def _by_a_worker(setting: Setting, mib: int, kills: bool) -> None:
    """A lease's worker is full of the mark, and ends or is killed."""
    from jupyter_gpupool.pytorch.client import session

    with started(setting.device(0.9)) as (near, pid):
        session.activate(near)
        pieces = take(REMOTE, mib)
        for piece in pieces:
            piece.fill_(MARK)
        if marked(pieces[-1:]) != _PIECE_MIB * MIB // 4:
            raise SystemExit("the worker's memory has no mark, so that there is nothing to find")
        os.kill(pid, signal.SIGKILL if kills else signal.SIGTERM)
        del piece
        pieces.clear()
        if not kills:
            _until_ended(pid)
        session.deactivate()


def _until_ended(pid: int) -> None:
    deadline = time.monotonic() + 30.0
    while any(child.pid == pid for child in multiprocessing.active_children()):
        if time.monotonic() > deadline:
            raise SystemExit("the worker has not ended within 30 s of SIGTERM")
        time.sleep(0.01)


def run(setting: Setting, report: Report) -> None:
    """Report what is found in as much of the card as a process can take, each time after another one's end."""
    total = setting.device().total_mib
    mib = setting.size(int(total * 0.85), 2 * _PIECE_MIB)
    native = setting.native
    if not setting.rehearse:  # host memory is the kernel's again once it is freed
        take(native, _PIECE_MIB)[0].fill_(MARK)
        # PyTorch gives the same memory again, as it is: so marks that are there are seen.
        report("seen_within_a_process", int(marked(take(native, _PIECE_MIB)) > 0))
        torch.cuda.empty_cache()
    for name, kills in (("end", False), ("kill", True)):
        filled, words = _in_a_process(_fill, native, mib, kills, kills=kills)
        if words != _PIECE_MIB * MIB // 4:
            raise SystemExit("a process that fills memory does not find what it wrote")
        looked, found = _in_a_process(_look, native, mib)
        report(f"filled_before_{name}_mib", filled)
        report(f"read_after_{name}_mib", looked)
        report(f"words_after_{name}", found)
    for name, kills in (("workers_end", False), ("workers_kill", True)):
        _by_a_worker(setting, mib, kills)
        report(f"words_after_{name}", _in_a_process(_look, native, mib)[1])

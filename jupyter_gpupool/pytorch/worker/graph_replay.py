"""Runs graphs as their device has recorded them, where it records, and where that is possible and worth it.

A recording does its work on the memory that it was made with. So inputs that are always in one place, as parameters
are, must be there still; the others are copied into memory of the recording first.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol.sizes import rounded

from .graph_fusion import FusedGraph, while_nothing_is_compiled
from .graph_steps import GraphSteps
from .recordings import CannotRecord, Kept, NoRoom, Recordings
from .templates import nbytes_of

#: An input that was in one place in so many calls is expected to stay there.
CALLS = 3
#: After so many recordings in turn whose inputs moved too soon, a graph is not recorded any more.
MAX_RECORDINGS = 8
#: A recording that was replayed so many times has paid, whatever comes then.
PAID_REPLAYS = 100

#: The most calls until a graph tries again what was of no use. A try costs as much as some calls.
MAX_PATIENCE = 1000

#: What the estimate of :func:`saved_us` counts with, for one operator that the host starts, one that runs from a
#: recording, and a copy; and the bytes that a GPU copies in a microsecond.
_STARTED_US, _RECORDED_US, _COPY_US = 5.0, 1.0, 5.0
_BYTES_PER_US = 500_000

_UNKNOWN_BEFORE = frozenset([torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape])

#: Operators that wait for the device, or whose results the host has to know first.
_READING = (
    "item",
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique",
    "tolist",
)


class Plan:
    """Which inputs of a graph are copied, by their positions. The others stay where they are.

    ``places``: the addresses of the inputs; those of the ones that move are of no account.
    """

    def __init__(self, moving: Sequence[int], places: Sequence[int]) -> None:
        self.moving = tuple(moving)
        staying = [k for k in range(len(places)) if k not in set(moving)]
        # One look at hundreds of parameters, for it is taken at each call.
        self._staying = operator.itemgetter(*staying) if staying else lambda addresses: None
        self._places = self._staying(places)

    def fits(self, addresses: Sequence[int]) -> bool:
        """Whether the inputs of a call are where they have to be."""
        return bool(self._staying(addresses) == self._places)


class Habits:
    """Where the inputs of a graph were in its last calls, by their addresses.

    One input that moves once is no habit: what to expect is said CALLS calls after the last expectation failed.
    """

    def __init__(self) -> None:
        self._calls: deque[tuple[int, ...]] = deque(maxlen=CALLS)
        #: the calls until something is expected; None while what was expected happens
        self._left: int | None = CALLS
        self._patience = CALLS

    def note(self, addresses: tuple[int, ...], as_expected: bool) -> None:
        """A call has inputs at these addresses."""
        self._calls.append(addresses)
        if self._left is not None:
            self._left -= 1
        elif not as_expected:
            self._left = CALLS - 1

    def expect(self) -> Plan | None:
        """What to expect of the next call; None while that is not known."""
        if self._left is None or self._left > 0:
            return None
        self._left = None
        found = [set(addresses) for addresses in zip(*self._calls)]
        return Plan([k for k, addresses in enumerate(found) if len(addresses) > 1], self._calls[-1])

    def look_later(self) -> None:
        """What is expected is of no use now; look again after twice as many calls as the last time, up to a limit."""
        self._patience = min(2 * self._patience, MAX_PATIENCE)
        self._left = self._patience

    def forget_what_was_in_vain(self) -> None:
        """Look again as early as at first, the next time that what is expected is of no use."""
        self._patience = CALLS


def objection(graph: GraphSteps) -> str:
    """Why a graph is never recorded, as far as its definition tells; empty if it may be."""
    if not graph.wants_recording:
        return "its program does not want it"
    if graph.refused:
        return "it has an operator that is refused"
    for step in graph.steps:
        if _UNKNOWN_BEFORE.intersection(getattr(step.kernel, "tags", ())):
            return f"{step.name} has results that depend on elements"
        if step.name.split("::")[-1].split(".")[0] in _READING:
            return f"{step.name} waits for the device"
    if not graph.steps:
        return "it has no operators"
    return ""


def saved_us(operators: int, copied: Sequence[int]) -> float:
    """The microseconds that a recording of so many operators saves, where tensors of these bytes are copied besides.

    An estimate: how much it is differs between cards, but not whether it is anything, for all but a few graphs.
    """
    copies = sum(_COPY_US + 2 * nbytes / _BYTES_PER_US for nbytes in copied)
    return operators * (_STARTED_US - _RECORDED_US) - copies


def prevents(graph: GraphSteps, plan: Plan) -> str:
    """Why a graph cannot be recorded while its inputs are used so; empty if it can be."""
    written = sorted(graph.written.intersection(plan.moving))
    if written:
        return f"input {written[0]}, which it writes to, is at another place in each call"
    copied = [nbytes_of(graph.inputs[k]) for k in plan.moving]
    copied += [nbytes for _, _, nbytes in graph.returned]
    if saved_us(len(graph.steps), copied) <= 0:
        return "copying its inputs and results takes longer than starting its operators"
    return ""


def kept_bytes(graph: GraphSteps, plan: Plan) -> int:
    """The bytes that a recording keeps, as far as is known before."""
    return graph.peak + sum(rounded(nbytes_of(graph.inputs[k])) for k in plan.moving)


class ReplayedGraph:
    """Runs a graph, and replays what the device has recorded of it."""

    def __init__(self, fused: FusedGraph, recordings: Recordings) -> None:
        self.fused = fused
        self.graph = fused.graph
        self._recordings = recordings
        self._habits = Habits()
        self._plan: Plan | None = None
        self._kept: Kept | None = None
        #: memory for inputs that move: one call was done with it, the next is recorded
        self._rehearsed: dict[int, torch.Tensor] | None = None
        #: how often the recording was replayed, and the recordings in turn whose inputs moved before that had paid
        self._replays = 0
        self._moved = 0
        #: why it is not recorded; empty if it is, or will be
        self.objection = objection(self.graph) if recordings.are_made else "its device does not record"

    @property
    def state(self) -> str:
        """As GRAPHS answers it."""
        return "recorded" if self._kept is not None else self.fused.state

    def run(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Run the graph, as :meth:`GraphSteps.run`."""
        if self.objection or not self.fused.is_settled:
            return self.fused.run(tensors)
        addresses = tuple([t.data_ptr() for t in tensors])
        plan = self._plan
        fits = plan is not None and plan.fits(addresses)
        self._habits.note(addresses, fits)
        if plan is not None and fits and not self._overlaps(plan, tensors):
            found = self._as_recorded(plan, tensors)
            if found is not None:
                return found
        expected = self._habits.expect()
        if expected is not None and not self._overlaps(expected, tensors):
            if self._may_record(expected):
                return self._rehearse(expected, tensors)
            self._habits.look_later()
        return self.fused.run(tensors)

    def forget(self) -> None:
        """Free what a recording keeps: the graph is not called any more."""
        kept, self._kept, self._plan, self._rehearsed = self._kept, None, None, None
        if kept is not None:
            self._recordings.drop(kept)

    def _as_recorded(self, plan: Plan, tensors: Sequence[torch.Tensor]) -> list[Any] | None:
        """The results, by a recording; None if there is none, and nothing was done."""
        if self._kept is None:
            self._record(tensors)
            if self._rehearsed is not None:  # something is compiled just now: the next call tries again
                return None
        results = None
        if self._kept is not None:
            results = self._recordings.replay(self._kept, tensors)
        if results is None:
            # It could not be recorded, or the memory was needed for something else. Both may last.
            self._kept = self._plan = None
            self._habits.look_later()
            return None
        self._replays += 1
        if self._replays == PAID_REPLAYS:
            self._habits.forget_what_was_in_vain()
        return results

    def _overlaps(self, plan: Plan, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether an input that is copied is on memory that the call writes to: the copy would keep what was there."""
        if not self.graph.written or not plan.moving:
            return False
        written = {tensors[k].untyped_storage().data_ptr() for k in self.graph.written}
        return any(tensors[k].untyped_storage().data_ptr() in written for k in plan.moving)

    def _may_record(self, plan: Plan) -> bool:
        if prevents(self.graph, plan):
            return False
        return self._recordings.are_made_now and self._recordings.has_room(kept_bytes(self.graph, plan))

    def _rehearse(self, plan: Plan, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Do this call as the next one will be recorded."""
        if self._replays >= PAID_REPLAYS:
            self._moved = 0
        elif self._plan is not None and not self._was_forgotten():
            self._moved += 1  # by the program; parking and the need for memory say nothing about it
        self.forget()
        if self._moved >= MAX_RECORDINGS:
            self.objection = "its inputs are at other places again and again"
            return self.fused.run(tensors)
        self._replays = 0
        try:
            buffers = self._recordings.buffers({k: tensors[k] for k in plan.moving})
        except torch.OutOfMemoryError:
            self._habits.look_later()
            return self.fused.run(tensors)
        results = self._recordings.rehearse(self.fused.run, tensors, buffers)
        self._plan, self._rehearsed = plan, buffers
        return results

    def _was_forgotten(self) -> bool:
        return self._kept is not None and self._kept.recording is None

    def _record(self, tensors: Sequence[torch.Tensor]) -> None:
        buffers = self._rehearsed
        assert buffers is not None, "a plan has been rehearsed or recorded"
        with while_nothing_is_compiled() as quiet:
            if not quiet:
                return
            self._rehearsed = None
            try:
                self._kept = self._recordings.record(self.fused.run, tensors, buffers)
            except NoRoom:
                pass
            except CannotRecord as e:
                self.objection = str(e)

"""Collectives between the sessions of one worker: each rank's session brings its tensors, the last one computes.

Nothing passes the clients. Ranks are summed in their order, so results do not depend on who comes first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .templates import BadRecord

#: The length in bytes of a group's random id.
GROUP_BYTES = 16
MAX_RANKS = 4096
#: How often a rank that waits looks whether its own session still goes on, in seconds.
_LOOK_S = 0.5

#: What combines two ranks' elements, by c10d's names.
_COMBINE: dict[str, Callable[..., torch.Tensor]] = {
    "SUM": torch.add,
    "AVG": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}


class Call(NamedTuple):
    """What all ranks of a collective have to agree on. ``operation``: of :data:`_COMBINE`; ``root``: a rank."""

    kind: str
    operation: str
    root: int


class Part(NamedTuple):
    """What a rank brings, and where it takes the result."""

    inputs: Sequence[torch.Tensor]
    outputs: Sequence[torch.Tensor]


class _Meeting:
    def __init__(self, call: Call) -> None:
        self.call = call
        self.parts: dict[int, Part] = {}
        self.done = False
        self.failure: Exception | None = None


class _Group:
    def __init__(self, size: int) -> None:
        self.size = size
        self.members: dict[int, object] = {}
        self.gone: set[int] = set()
        self.meetings: dict[int, _Meeting] = {}


class Meetings:
    """The groups of ranks in one worker. Safe to use from the threads of all sessions."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._groups: dict[bytes, _Group] = {}

    def meet(
        self,
        member: object,
        place: tuple[bytes, int, int, int],
        call: Call,
        part: Part | Exception,
        timeout_s: float,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take part in a collective, and return when its result is there.

        ``place``: the group, its size, the rank, and the number of the collective in its group. ``part`` may be the
        reason why this rank cannot take part. Raises RuntimeError, naming ranks, if others are missing or gone or
        call something else; ValueError for tensors that do not fit together; BadRecord.
        """
        group_id, size, rank, number = place
        with self._changed:
            group = self._groups.setdefault(group_id, _Group(size))
            if group.size != size or group.members.setdefault(rank, member) is not member:
                raise BadRecord(f"rank {rank} of {size} in a group of {group.size} that has it already")
            meeting = group.meetings.setdefault(number, _Meeting(call))
            if rank in meeting.parts:
                raise BadRecord(f"rank {rank} comes twice to collective {number}")
            if meeting.call != call:
                meeting.failure = RuntimeError(
                    f"rank {rank} calls {_named(call)} where others call {_named(meeting.call)}"
                )
            if isinstance(part, Exception):
                meeting.failure = meeting.failure or RuntimeError(f"rank {rank} cannot take part: {part}")
                part = Part((), ())
            meeting.parts[rank] = part
            if group.gone and meeting.failure is None:
                meeting.failure = _gone(group.gone)
            is_last = len(meeting.parts) == size
            if is_last or meeting.failure is not None:
                group.meetings.pop(number, None)
        if is_last and meeting.failure is None:
            self._hold(meeting, size)
        with self._changed:
            self._changed.notify_all()
            deadline = time.monotonic() + timeout_s
            while not meeting.done and meeting.failure is None:
                if is_over() or time.monotonic() > deadline:
                    missing = [r for r in range(size) if r not in meeting.parts]
                    meeting.failure = RuntimeError(
                        f"rank {rank} waited {timeout_s:g} s in {_named(call)} for {_ranks(missing)}"
                    )
                    self._changed.notify_all()
                    break
                self._changed.wait(_LOOK_S)
            if meeting.failure is not None:
                raise meeting.failure

    def _hold(self, meeting: _Meeting, size: int) -> None:
        try:
            compute(meeting.call, [meeting.parts[r] for r in range(size)])
        except Exception as e:
            meeting.failure = e
        meeting.done = True

    def leave(self, member: object) -> None:
        """A session has ended: whoever waits for its ranks is told."""
        with self._changed:
            for id, group in list(self._groups.items()):
                left = {rank for rank, one in group.members.items() if one is member}
                if not left:
                    continue
                group.gone |= left
                for meeting in group.meetings.values():
                    if not left <= meeting.parts.keys():
                        meeting.failure = meeting.failure or _gone(left)
                if group.gone >= group.members.keys():
                    del self._groups[id]
            self._changed.notify_all()


def _gone(ranks: set[int]) -> RuntimeError:
    verb = "has" if len(ranks) == 1 else "have"
    return RuntimeError(f"{_ranks(sorted(ranks))} {verb} ended or left the lease")


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _named(call: Call) -> str:
    return (
        f"{call.kind}({call.operation or f'root {call.root}'})"
        if call.operation or call.root >= 0
        else call.kind
    )


def compute(call: Call, parts: Sequence[Part]) -> None:
    """Fill every rank's outputs. Raises BadRecord, and ValueError for tensors that do not fit together."""
    kind, operation, root = call
    inputs, outputs = [p.inputs for p in parts], [p.outputs for p in parts]
    every = range(len(parts))
    receivers = every if root < 0 else (root,)
    if kind == "all_reduce":
        count = _common(inputs)
        # What every rank gets can be summed where the first one's is, unless that is read once more.
        in_place = root < 0 and count == 1 and _is_own(inputs, outputs)
        totals = [_combined(operation, [inputs[r][k] for r in every], in_place) for k in range(count)]
        for r in receivers:
            _fill(outputs[r], totals)
    elif kind == "broadcast":
        sent = [t.clone() for t in inputs[root]]
        for r in every:
            _fill(outputs[r], sent)
    elif kind == "gather":
        sent = [inputs[r][0].clone() for r in every if _common(inputs) == 1]
        for r in receivers:
            _fill(outputs[r], sent)
    elif kind == "scatter":
        sent = [t.clone() for t in inputs[root]]
        for r in every:
            _fill(outputs[r], sent[r : r + 1])
    elif kind == "reduce_scatter":
        if _common(inputs) != len(parts):
            raise ValueError(f"{len(parts)} ranks scatter {_common(inputs)} tensors each")
        totals = [_combined(operation, [inputs[r][k] for r in every]) for k in every]
        for r in every:
            _fill(outputs[r], totals[r : r + 1])
    elif kind == "all_to_all":
        if _common(inputs) != len(parts):
            raise ValueError(f"{len(parts)} ranks exchange {_common(inputs)} tensors each")
        swapped = [[inputs[r][k].clone() for r in every] for k in every]
        for r in every:
            _fill(outputs[r], swapped[r])
    else:
        raise BadRecord(f"a collective named {kind!r:.40}")


def _common(tensors: Sequence[Sequence[torch.Tensor]]) -> int:
    """How many tensors each rank brings."""
    counts = {len(some) for some in tensors}
    if len(counts) != 1:
        raise ValueError(f"the ranks bring different numbers of tensors: {sorted(counts)}")
    return counts.pop()


def _is_own(inputs: Sequence[Sequence[torch.Tensor]], outputs: Sequence[Sequence[torch.Tensor]]) -> bool:
    """Whether the first rank's result goes where its only tensor is, and no other rank has that memory."""
    (first, *others) = inputs
    memory = first[0].untyped_storage()._cdata
    return (
        len(outputs[0]) == 1
        and outputs[0][0] is first[0]
        and all(t.untyped_storage()._cdata != memory for tensors in others for t in tensors)
    )


def _combined(operation: str, tensors: Sequence[torch.Tensor], in_place: bool = False) -> torch.Tensor:
    """The ranks' elements, combined in the order of the ranks; ``in_place``: in the first one's tensor."""
    combine = _COMBINE.get(operation)
    if combine is None:
        raise BadRecord(f"a reduction named {operation!r:.40}")
    first = tensors[0]
    for r, t in enumerate(tensors):
        if t.dtype != first.dtype or t.numel() != first.numel():
            raise ValueError(
                f"rank {r} has {t.numel()} elements of {t.dtype} where rank 0 has {first.numel()} of {first.dtype}"
            )
    flat = [t.reshape(first.shape).to(first.device) for t in tensors]
    if operation == "AVG" and not first.is_floating_point() and not first.is_complex():
        raise ValueError(f"a mean of {first.dtype} is not of that type: reduce with SUM, and divide")
    total = first if in_place else flat[0].clone()
    for t in flat[1:]:
        combine(total, t, out=total)
    if operation == "AVG":  # real and imaginary parts by themselves, as NCCL sees them
        (torch.view_as_real(total) if total.is_complex() else total).div_(len(tensors))
    return total


def _fill(outputs: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    if len(outputs) != len(values):
        raise ValueError(f"{len(values)} tensors for {len(outputs)} outputs")
    for target, value in zip(outputs, values):
        if target.dtype != value.dtype or target.numel() != value.numel():
            raise ValueError(
                f"{value.numel()} elements of {value.dtype} for a tensor of {target.numel()} of {target.dtype}"
            )
        if target is not value:
            target.copy_(value.reshape(target.shape))

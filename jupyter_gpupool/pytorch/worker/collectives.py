"""Collectives between the sessions of one worker: each rank's session brings its tensors, the last one computes.

Nothing passes the clients. Ranks are summed in their order, so results do not depend on who comes first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import torch

from .exchange_plan import Call as Call
from .templates import BadRecord

#: The length in bytes of a group's random id.
GROUP_BYTES = 16
MAX_RANKS = 4096
#: How often a rank that waits looks whether its own session still goes on, in seconds.
_LOOK_S = 0.5

#: A copy is a broadcast that leaves the root's own tensors alone.
_KINDS = frozenset(("all_reduce", "broadcast", "copy", "gather", "scatter", "reduce_scatter", "all_to_all"))
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


class Part(NamedTuple):
    """What a rank brings, and where it takes the result."""

    inputs: Sequence[torch.Tensor]
    outputs: Sequence[torch.Tensor]


class Meeting:
    """One collective: the parts of the ranks that have come to it."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.parts: dict[int, Part] = {}
        self.done = False
        self.failure: Exception | None = None

    @property
    def is_waited_in(self) -> bool:
        """Whether somebody waits in it, as far as is known."""
        return self.failure is None and not self.done

    def missing(self, size: int) -> list[int]:
        """The ranks for which the others wait."""
        return [r for r in range(size) if r not in self.parts]

    def lacks(self, ranks: Collection[int]) -> bool:
        """Whether one of these ranks has not come."""
        return any(r not in self.parts for r in ranks)


class Group:
    """The ranks of a group. ``near``: how many of them are in this worker."""

    def __init__(self, id: bytes, size: int) -> None:
        self.id = id
        self.size = size
        self.near = size
        self.members: dict[int, object] = {}
        self.gone: set[int] = set()
        self.meetings: dict[int, Meeting] = {}

    def new_meeting(self, call: Call) -> Meeting:
        """A collective that has just begun."""
        return Meeting(call)

    def objection(self) -> Exception | None:
        """Why its ranks cannot meet any more."""
        return gone(self.gone) if self.gone else None

    def waits_for(self, member: object) -> bool:
        """Whether a rank has come to a collective for which this session is missing, as far as is known."""
        is_known = any(one is member for one in self.members.values())
        return any(
            owner is member or (owner is None and not is_known)
            for meeting in self.meetings.values()
            if meeting.is_waited_in
            for owner in map(self.members.get, self.missing(meeting))
        )

    def missing(self, meeting: Meeting) -> Iterable[int]:
        """The ranks in this worker that have not come to a collective."""
        return meeting.missing(self.size)

    def is_over(self, meeting: Meeting) -> bool:
        """Whether nothing has to be known any more of a collective that is about to be computed or has failed."""
        return meeting.failure is not None or len(meeting.parts) == self.size


class Patience(NamedTuple):
    """How long a rank waits: until ``deadline`` on a monotonic clock, which is in ``timeout_s``, and no longer than its
    own session goes on."""

    rank: int
    timeout_s: float
    deadline: float
    is_over: Callable[[], bool]


class Meetings:
    """The groups of ranks in one worker. Safe to use from the threads of all sessions."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._groups: dict[bytes, Group] = {}

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
        patience = Patience(rank, timeout_s, time.monotonic() + timeout_s, is_over)
        with self._changed:
            group = self._groups.get(group_id) or self._groups.setdefault(group_id, Group(group_id, size))
            if group.size != size or group.members.setdefault(rank, member) is not member:
                raise BadRecord(f"rank {rank} of {size} in a group of {group.size} that has it already")
            meeting = group.meetings.get(number)
            if meeting is None:
                meeting = group.meetings[number] = group.new_meeting(call)
            if rank in meeting.parts:
                raise BadRecord(f"rank {rank} comes twice to collective {number}")
            if meeting.call != call:
                meeting.failure = meeting.failure or other_call(rank, call, meeting.call)
            if isinstance(part, Exception):
                meeting.failure = meeting.failure or RuntimeError(f"rank {rank} cannot take part: {part}")
                part = Part((), ())
            meeting.parts[rank] = part
            meeting.failure = meeting.failure or group.objection()
            is_last = len(meeting.parts) == group.near
            if group.is_over(meeting):
                group.meetings.pop(number, None)
            self._changed.notify_all()
        try:
            if is_last and meeting.failure is None:
                self._complete(group, number, meeting, patience)
            self._until(lambda: meeting.done, group, meeting, patience)
            if meeting.failure is not None:
                raise meeting.failure
        except Exception as e:
            self._note_failure(group, number, meeting, e)
            raise

    def _until(
        self, condition: Callable[[], bool], group: Group, meeting: Meeting, patience: Patience
    ) -> None:
        """Wait until that is true. Raises the collective's failure, if there is one before."""
        with self._changed:
            while not condition():
                if meeting.failure is not None:
                    raise meeting.failure
                if patience.is_over() or time.monotonic() > patience.deadline:
                    meeting.failure = RuntimeError(
                        f"rank {patience.rank} waited {patience.timeout_s:g} s in {_named(meeting.call)} "
                        f"for {named_ranks(meeting.missing(group.size))}"
                    )
                    self._changed.notify_all()
                    continue
                self._changed.wait(_LOOK_S)

    def _complete(self, group: Group, number: int, meeting: Meeting, patience: Patience) -> None:
        """Compute the result, in the thread of the last rank here."""
        try:
            compute(meeting.call, [meeting.parts[r] for r in range(group.size)])
        except Exception as e:
            meeting.failure = e
        self._finish(meeting)

    def _finish(self, meeting: Meeting) -> None:
        with self._changed:
            meeting.done = True
            self._changed.notify_all()

    def _note_failure(self, group: Group, number: int, meeting: Meeting, failure: Exception) -> None:
        """A collective has failed at a rank here."""

    def wait_for(self, member: object) -> bool:
        """Whether ranks, here or at another worker, wait in a collective for this session."""
        with self._changed:
            return any(group.waits_for(member) for group in self._groups.values())

    def leave(self, member: object) -> None:
        """A session has ended: whoever waits for its ranks is told."""
        with self._changed:
            for id, group in list(self._groups.items()):
                left = {rank for rank, one in group.members.items() if one is member}
                if not left:
                    continue
                self._note_gone(group, left)
                if group.gone >= group.members.keys():
                    del self._groups[id]
            self._changed.notify_all()

    def _note_gone(self, group: Group, left: set[int]) -> None:
        group.gone |= left
        for meeting in group.meetings.values():
            if meeting.lacks(left):
                meeting.failure = meeting.failure or gone(left)


def gone(ranks: Collection[int]) -> RuntimeError:
    """What ranks hear that wait for those."""
    verb = "has" if len(ranks) == 1 else "have"
    return RuntimeError(f"{named_ranks(sorted(ranks))} {verb} ended or left the lease")


def other_call(rank: int, call: Call, others: Call) -> RuntimeError:
    """What all ranks hear where one of them calls something else."""
    return RuntimeError(f"rank {rank} calls {_named(call)} where others call {_named(others)}")


def named_ranks(ranks: Sequence[int]) -> str:
    """Ranks, as a message names them."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _named(call: Call) -> str:
    return (
        f"{call.kind}({call.operation or f'root {call.root}'})"
        if call.operation or call.root >= 0
        else call.kind
    )


def compute(call: Call, parts: Sequence[Part], here: Collection[int] | None = None) -> None:
    """Fill the outputs of the ranks ``here``; None: of all. Raises BadRecord, and ValueError for tensors that do not
    fit together.

    Of the other ranks only those tensors are used that go to the ranks here; in the place of others may be anything.
    """
    kind, operation, root = call
    inputs, outputs = [p.inputs for p in parts], [p.outputs for p in parts]
    every = range(len(parts))
    receives = every if root < 0 or kind in ("broadcast", "copy", "scatter") else (root,)
    receivers = [r for r in receives if (here is None or r in here) and (kind, r) != ("copy", root)]
    if kind not in _KINDS:
        raise BadRecord(f"a collective named {kind!r:.40}")
    if not receivers:
        return
    if kind == "all_reduce":
        count = _common(inputs)
        # What every rank gets can be summed where the first one's is, unless that is read once more; it is not where
        # the first rank is elsewhere.
        is_copy = here is not None and 0 not in here
        in_place = is_copy or (root < 0 and count == 1 and _is_own(inputs, outputs))
        totals = [_combined(operation, [inputs[r][k] for r in every], in_place) for k in range(count)]
        for r in receivers:
            _fill(outputs[r], totals)
    elif kind == "broadcast":
        sent = [t.clone() for t in inputs[root]]
        for r in receivers:
            _fill(outputs[r], sent)
    elif kind == "copy":
        for r in receivers:
            _fill(outputs[r], inputs[root])
    elif kind == "gather":
        sent = [inputs[r][0].clone() for r in every if _common(inputs) == 1]
        for r in receivers:
            _fill(outputs[r], sent)
    elif kind == "scatter":
        rows = {r: [t.clone() for t in inputs[root][r : r + 1]] for r in receivers}
        for r in receivers:
            _fill(outputs[r], rows[r])
    elif kind == "reduce_scatter":
        if _common(inputs) != len(parts):
            raise ValueError(f"{len(parts)} ranks scatter {_common(inputs)} tensors each")
        reduced = {k: _combined(operation, [inputs[r][k] for r in every]) for k in receivers}
        for r in receivers:
            _fill(outputs[r], [reduced[r]])
    else:
        if _common(inputs) != len(parts):
            raise ValueError(f"{len(parts)} ranks exchange {_common(inputs)} tensors each")
        swapped = {k: [inputs[r][k].clone() for r in every] for k in receivers}
        for r in receivers:
            _fill(outputs[r], swapped[r])


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

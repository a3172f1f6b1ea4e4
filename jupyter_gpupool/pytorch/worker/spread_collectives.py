"""Collectives of ranks at several workers of a lease, which send each other what their ranks need.

A worker whose ranks have all come sends their cards to the others. When it has everybody's, and they fit together, it
sends elements; who has sent a card has memory for them. Each worker computes for its own ranks, in the order of the
ranks, so that all have the same digits as in one worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol.sizes import host_bytes

from .collectives import Group, Meeting, Meetings, Part, Patience, compute, named_ranks, other_call
from .exchange_plan import Call, Card, Key, card_of, check, crossing, packed, unpacked
from .peer_links import MAX_HEADER, PeerLink, Read, Sending
from .staging import discard
from .templates import BadRecord

#: How many collectives of a group may have been begun elsewhere and not here; of more nothing is kept.
_MAX_AHEAD = 1024
_MAX_FAILURE_CHARACTERS = 500
#: How long another worker may take to read what it is sent of a collective that has failed, at least; and how often
#: that is looked at. In seconds.
_SETTLE_S = 10.0
_LOOK_S = 0.5


@dataclass(frozen=True)
class GroupState:
    """A group as another worker goes on with it. ``workers``: each rank's, by name; ``members``: ranks here, with the
    ids of their sessions."""

    id: bytes
    workers: tuple[str, ...]
    members: tuple[tuple[int, str], ...]
    gone: tuple[int, ...]
    first: int
    lost: str
    #: collectives that have failed, and to which ranks here have not come: number, kind, operation, root, why
    failed: tuple[tuple[int, str, str, int, str], ...]


class _What(IntEnum):
    """What a frame between workers is: its header begins with this, and the group."""

    CARDS = 1  # number, kind, operation, root, cards: all ranks there have come
    ELEMENTS = 2  # number, rank, position of the tensor among the rank's; payload: its elements
    FAILED = 3  # number, kind, operation, root, why
    LEFT = 4  # ranks: they have ended or left the lease


class _SpreadMeeting(Meeting):
    def __init__(self, call: Call) -> None:
        super().__init__(call)
        #: of all ranks whose workers have sent them
        self.cards: dict[int, Card] = {}
        #: whether all ranks here have come, so that others may send
        self.is_ready = False
        #: the tensors that each other worker is to send and has not begun to, once it has begun
        self.due: dict[PeerLink, set[Key]] = {}
        self.arrived: dict[Key, torch.Tensor] = {}
        #: whether the others know of its failure
        self.is_told = False

    def missing(self, size: int) -> list[int]:
        """The ranks for which the others wait."""
        waited_for = [r for r in range(size) if r not in self.parts and r not in self.cards]
        return waited_for or super().missing(size)

    def lacks(self, ranks: Collection[int]) -> bool:
        """Whether one of these ranks has not come."""
        return any(r not in self.parts and r not in self.cards for r in ranks)


class _SpreadGroup(Group):
    def __init__(self, id: bytes, links: Sequence[PeerLink | None]) -> None:
        super().__init__(id, len(links))
        self.links = list(links)
        self.near = sum(link is None for link in links)
        self.here = [r for r, link in enumerate(links) if link is None]
        #: the ranks at each other worker
        self.there: dict[PeerLink, list[int]] = {}
        for r, link in enumerate(links):
            if link is not None:
                self.there.setdefault(link, []).append(r)
        #: all collectives before this number are over
        self.first = 0
        self.lost = ""

    def new_meeting(self, call: Call) -> _SpreadMeeting:
        return _SpreadMeeting(call)

    def objection(self) -> Exception | None:
        return RuntimeError(self.lost) if self.lost else super().objection()

    def missing(self, meeting: Meeting) -> Iterable[int]:
        return [r for r in self.here if r not in meeting.parts]

    def is_over(self, meeting: Meeting) -> bool:
        # What has failed here may fail for another rank here, too, which has not come yet.
        return meeting.failure is not None and len(meeting.parts) == self.near

    def relink(self, before: PeerLink, now: PeerLink) -> None:
        """The ranks behind one link are behind another one from now on."""
        self.links = [now if link is before else link for link in self.links]
        self.there = {now if link is before else link: ranks for link, ranks in self.there.items()}

    def tell(self, *header: Any) -> None:
        for link in self.there:
            link.send([header[0], self.id, *header[1:]])


class SpreadMeetings(Meetings):
    """Meetings of ranks, some of which may be at other workers."""

    def spread(self, member: object, group_id: bytes, rank: int, links: Sequence[PeerLink | None]) -> str:
        """This session is a rank of that group, whose ranks are behind these links; None: here.

        Returns why it cannot be, or an empty string. Raises BadRecord.
        """
        with self._changed:
            group = self._groups.setdefault(group_id, _SpreadGroup(group_id, links))
            if not isinstance(group, _SpreadGroup) or group.size != len(links) or links[rank] is not None:
                raise BadRecord("a group whose ranks are elsewhere")
            if group.members.setdefault(rank, member) is not member:
                raise BadRecord(f"rank {rank} of a group that has it already")
            if group.links != list(links):
                return "a link between the lease's workers was lost"
            return next((link.lost for link in group.there if link.lost), "")

    # -- where a worker moves: nobody is in a collective then

    def describe(self, name: str, sessions: Mapping[object, str]) -> tuple[GroupState, ...]:
        """The groups with ranks at other workers. ``name``: this worker's; ``sessions``: the members' ids."""
        with self._changed:
            return tuple(
                GroupState(
                    group.id,
                    tuple(name if link is None else link.name for link in group.links),
                    tuple((rank, sessions.get(one, "")) for rank, one in group.members.items()),
                    tuple(group.gone),
                    group.first,
                    group.lost,
                    tuple(
                        (number, *meeting.call, str(meeting.failure))
                        for number, meeting in group.meetings.items()
                        if meeting.failure is not None
                    ),
                )
                for group in self._groups.values()
                if isinstance(group, _SpreadGroup)
            )

    def restore(
        self,
        groups: Collection[GroupState],
        name: str,
        find: Callable[[str], PeerLink | None],
        members: Mapping[str, object],
    ) -> None:
        """Take over what :meth:`describe` returned. ``find``: the link to a worker; ``members``: by their ids.

        Raises ValueError if a link is not there.
        """
        with self._changed:
            for state in groups:
                found = {other: find(other) for other in state.workers if other != name}
                if None in found.values():
                    raise ValueError("the lease's other workers are not linked")
                group = _SpreadGroup(state.id, [found.get(other) for other in state.workers])
                group.members = {rank: members.get(id, object()) for rank, id in state.members}
                group.gone, group.first = set(state.gone), state.first
                group.lost = state.lost or next((link.lost for link in group.there if link.lost), "")
                for number, kind, operation, root, why in state.failed:
                    meeting = group.new_meeting(Call(kind, operation, root))
                    meeting.failure, meeting.is_told = RuntimeError(why), True
                    group.meetings[number] = meeting
                self._groups[state.id] = group

    def relink(self, before: PeerLink, now: PeerLink) -> None:
        """The worker behind a link has moved: its ranks are behind another link."""
        with self._changed:
            for group in self._groups.values():
                if isinstance(group, _SpreadGroup) and before in group.there:
                    group.relink(before, now)
            self._changed.notify_all()

    def wake(self) -> None:
        """Let those who wait look again."""
        with self._changed:
            self._changed.notify_all()

    # -- in the thread of the last rank here

    def _complete(self, group: Group, number: int, meeting: Meeting, patience: Patience) -> None:
        if not isinstance(group, _SpreadGroup) or not isinstance(meeting, _SpreadMeeting):
            super()._complete(group, number, meeting, patience)
            return
        call = meeting.call
        own = {r: card_of(*meeting.parts[r]) for r in group.here}
        check(call, group.size, own)
        cards = packed(own)
        if _estimated_bytes(own) > MAX_HEADER // 2:
            raise ValueError("these are more tensors than ranks at several GPU servers exchange at once")
        with self._changed:
            meeting.cards.update(own)
            meeting.is_ready = True
        group.tell(_What.CARDS, number, *call, cards)
        self._until(lambda: len(meeting.cards) == group.size, group, meeting, patience)
        check(call, group.size, meeting.cards)
        sendings = [
            (_send(link, group.id, number, key, meeting.parts[key[0]]), link)
            for link, ranks in group.there.items()
            for key in crossing(call, own, group.here, ranks)
        ]
        wanted = {
            key for ranks in group.there.values() for key in crossing(call, meeting.cards, ranks, group.here)
        }
        try:
            self._until(
                lambda: meeting.arrived.keys() >= wanted and all(s.is_sent for s, _ in sendings),
                group,
                meeting,
                patience,
            )
        except Exception:
            self._settle(sendings, patience)
            raise
        with self._changed:  # what is lost from now on concerns others
            meeting.failure = None
            group.meetings.pop(number, None)
            group.first = max(group.first, number + 1)
        compute(call, _parts(group, meeting), group.here)
        self._finish(meeting)

    def _settle(self, sendings: Sequence[tuple[Sending, PeerLink]], patience: Patience) -> None:
        """Wait until elements are sent, though nobody may need them: the program changes them next."""
        deadline = max(time.monotonic() + _SETTLE_S, patience.deadline)
        with self._changed:
            while unsent := {link for s, link in sendings if not s.is_sent and not link.lost}:
                if time.monotonic() > deadline:
                    for link in unsent:
                        link.close("the other worker does not take what it is sent")
                    return
                self._changed.wait(_LOOK_S)

    def _note_failure(self, group: Group, number: int, meeting: Meeting, failure: Exception) -> None:
        if not isinstance(group, _SpreadGroup) or not isinstance(meeting, _SpreadMeeting):
            return
        with self._changed:
            meeting.failure = meeting.failure or failure
            is_told, meeting.is_told = meeting.is_told, True
            if len(meeting.parts) == group.near:
                group.meetings.pop(number, None)
                group.first = max(group.first, number + 1)
            self._changed.notify_all()
        if not is_told:
            group.tell(_What.FAILED, number, *meeting.call, str(failure)[:_MAX_FAILURE_CHARACTERS])

    def _note_gone(self, group: Group, left: set[int]) -> None:
        if isinstance(group, _SpreadGroup) and not left <= group.gone:
            group.tell(_What.LEFT, sorted(left))
        super()._note_gone(group, left)

    # -- in the thread that reads a link

    def lose(self, link: PeerLink, why: str) -> None:
        """A link has ended: no rank behind it can be met any more."""
        with self._changed:
            for group in self._groups.values():
                if isinstance(group, _SpreadGroup) and link in group.there:
                    group.lost = group.lost or (
                        f"the connection to the GPU server of {named_ranks(group.there[link])} is lost: {why}"
                    )
                    for meeting in group.meetings.values():
                        meeting.failure = meeting.failure or RuntimeError(group.lost)
            self._changed.notify_all()

    def hear(self, link: PeerLink, header: list[Any], nbytes: int, read: Read) -> None:
        """Take a frame of another worker. Raises BadRecord, TypeError and ValueError for what no worker sends."""
        what, group_id, *fields = header
        with self._changed:
            group = self._groups.get(group_id)
        if not isinstance(group, _SpreadGroup) or link not in group.there:
            if group is not None:
                raise BadRecord("a frame of a group whose ranks are not there")
            discard(read, nbytes)  # its ranks here have ended
            return
        if what == _What.ELEMENTS:
            self._take(group, link, fields, nbytes, read)
            return
        if nbytes:
            raise BadRecord(f"{nbytes} bytes that belong to nothing")
        hears: dict[int, Callable[..., None]] = {
            _What.CARDS: self._take_cards,
            _What.FAILED: self._take_failure,
            _What.LEFT: self._take_leave,
        }
        with self._changed:
            hears[_What(what)](group, link, *fields)
            self._changed.notify_all()

    def _begun(self, group: _SpreadGroup, number: Any, call: Call) -> _SpreadMeeting | None:
        """The collective of that number, if anything is still to be known of it."""
        _check_call(group, number, call)
        meeting = group.meetings.get(number)
        if meeting is None:
            if number < group.first or len(group.meetings) >= _MAX_AHEAD:
                return None
            meeting = group.meetings[number] = group.new_meeting(call)
        assert isinstance(meeting, _SpreadMeeting), "the group is spread"
        return meeting

    def _take_cards(
        self,
        group: _SpreadGroup,
        link: PeerLink,
        number: Any,
        kind: Any,
        operation: Any,
        root: Any,
        cards: Any,
    ) -> None:
        call, known = Call(kind, operation, root), unpacked(cards)
        if sorted(known) != group.there[link]:
            raise BadRecord(f"cards of the ranks {sorted(known)}")
        meeting = self._begun(group, number, call)
        if meeting is None:
            return
        if meeting.cards.keys() & known.keys():
            raise BadRecord(f"cards of collective {number} that came before")
        if meeting.call != call:
            meeting.failure = meeting.failure or other_call(group.there[link][0], call, meeting.call)
        meeting.cards.update(known)

    def _take_failure(
        self, group: _SpreadGroup, link: PeerLink, number: Any, kind: Any, operation: Any, root: Any, why: Any
    ) -> None:
        meeting = self._begun(group, number, Call(kind, operation, root))
        if not isinstance(why, str):
            raise BadRecord("a failure without a reason")
        if meeting is not None:
            meeting.failure = meeting.failure or RuntimeError(why[:_MAX_FAILURE_CHARACTERS])
            meeting.is_told = True

    def _take_leave(self, group: _SpreadGroup, link: PeerLink, ranks: Any) -> None:
        left = set(ranks)
        if not left or not left <= set(group.there[link]):
            raise BadRecord(f"ranks {ranks!r:.80} that leave")
        Meetings._note_gone(self, group, left)

    def _take(
        self, group: _SpreadGroup, link: PeerLink, fields: Sequence[Any], nbytes: int, read: Read
    ) -> None:
        number, rank, k = fields
        with self._changed:
            meeting = group.meetings.get(number)
            expected = self._due(group, link, meeting, (rank, k))
            if expected is not None and nbytes != expected.nbytes:
                raise BadRecord(f"{nbytes} bytes in place of {expected}")
        if expected is None:
            discard(read, nbytes)
            return
        blank = torch.empty(expected.length, dtype=expected.dtype)
        read(host_bytes(blank))
        with self._changed:
            assert isinstance(meeting, _SpreadMeeting), "the group is spread"
            meeting.arrived[rank, k] = blank
            self._changed.notify_all()

    def _due(self, group: _SpreadGroup, link: PeerLink, meeting: Meeting | None, key: Key) -> Any:
        """What of that tensor is due; None where it is not needed any more. Raises BadRecord if it never was."""
        if meeting is None or meeting.failure is not None:
            return None
        assert isinstance(meeting, _SpreadMeeting), "the group is spread"
        ranks = group.there[link]
        if not meeting.is_ready or not meeting.cards.keys() >= set(ranks):
            raise BadRecord("elements before the cards of both workers")
        if link not in meeting.due:
            between = {r: meeting.cards[r] for r in (*group.here, *ranks)}
            try:
                check(meeting.call, group.size, between)
            except ValueError as e:
                meeting.failure = e
                self._changed.notify_all()
                return None
            meeting.due[link] = set(crossing(meeting.call, between, ranks, group.here))
        if key not in meeting.due[link]:
            raise BadRecord(f"elements {key!r:.40} that nobody waits for")
        meeting.due[link].discard(key)
        return meeting.cards[key[0]].inputs[key[1]]


def _check_call(group: _SpreadGroup, number: Any, call: Call) -> None:
    named = isinstance(call.kind, str) and isinstance(call.operation, str)
    if not named or type(call.root) is not int or not -1 <= call.root < group.size:
        raise BadRecord(f"a collective {call!r:.80}")
    if type(number) is not int or number < 0:
        raise BadRecord(f"collective {number!r:.40}")


def _estimated_bytes(cards: dict[int, Card]) -> int:
    return sum(24 * (len(card.inputs) + len(card.outputs)) + 24 for card in cards.values())


def _send(link: PeerLink, group_id: bytes, number: int, key: Key, part: Part) -> Sending:
    rank, k = key
    elements = part.inputs[k].detach().contiguous().cpu()
    return link.send([_What.ELEMENTS, group_id, number, rank, k], host_bytes(elements))


def _parts(group: _SpreadGroup, meeting: _SpreadMeeting) -> list[Part]:
    """What all ranks bring; in place of what other ranks do not send here is nothing."""
    near = [meeting.parts[r] for r in group.here]
    device = next((t.device for part in near for t in (*part.outputs, *part.inputs)), torch.device("cpu"))
    nothing = torch.empty(0, device=device)
    return [
        meeting.parts.get(r)
        or Part([_moved(meeting, (r, k), nothing) for k in range(len(meeting.cards[r].inputs))], ())
        for r in range(group.size)
    ]


def _moved(meeting: _SpreadMeeting, key: Key, nothing: torch.Tensor) -> torch.Tensor:
    found = meeting.arrived.get(key)
    return nothing if found is None else found.to(nothing.device)

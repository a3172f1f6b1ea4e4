"""Executes a session's part in what ranks exchange: collectives, and tensors that one rank sends to another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from jupyter_gpupool.pytorch.protocol import commands as codes
from jupyter_gpupool.pytorch.protocol.sizes import rounded

from .collectives import GROUP_BYTES, MAX_RANKS, Call, Meetings, Part
from .device import Device
from .error_reports import report_of
from .exchange_plan import Elements
from .far_messages import FarMessages
from .messages import Messages
from .peer_links import PeerLinks
from .spread_collectives import SpreadMeetings
from .storages import BeyondStorage, Poisoned, Slot, StaleTensorError, within
from .templates import BadRecord

if TYPE_CHECKING:
    from .executor import WorkerSession


class Exchanges:
    """``commands``: what executes each command, as a function of its fields. ``is_over``: the client is gone."""

    def __init__(
        self,
        session: WorkerSession,
        meetings: Meetings,
        messages: Messages,
        is_over: Callable[[], bool],
        links: PeerLinks | None = None,
        far: FarMessages | None = None,
    ) -> None:
        self._session = session
        self._meetings = meetings
        self._messages = messages
        self._is_over = is_over
        self._links = links
        self._far = far
        self.commands: dict[int, Callable[..., Any]] = {
            codes.MEET: self._meet,
            codes.POST: self._post,
            codes.TAKE: self._take,
            codes.WITHDRAW: self._withdraw,
            codes.FETCH: self._fetch,
        }

    def leave(self) -> None:
        """The session ends: tell those who wait for it."""
        self._meetings.leave(self._session.sender)
        self._messages.leave(self._session.sender)

    def is_due(self) -> bool:
        """Whether a rank, here or at another worker, waits for this session."""
        sender = self._session.sender
        elsewhere = self._far.awaited() if self._far is not None else ()
        return self._meetings.wait_for(sender) or self._messages.wait_for(sender, elsewhere)

    # -- collectives

    def _meet(self, place: Any, call: Any, inputs: Any, outputs: Any, timeout_s: Any) -> None:
        """Execute MEET: wait for the other ranks of a collective, and take its result."""
        session = self._session
        try:
            group, size, rank, number = place
            kind, operation, root = call
            known = isinstance(group, bytes) and len(group) == GROUP_BYTES and isinstance(number, int)
            sizes = all(type(n) is int for n in (size, rank, root)) and 0 <= rank < size <= MAX_RANKS
            if not known or not sizes or not -1 <= root < size or not 0 <= timeout_s < 1e9:
                raise ValueError("a place that cannot be")
            agreed = Call(str(kind), str(operation), root)
        except (TypeError, ValueError) as e:
            raise BadRecord(f"a collective of {place!r:.80}: {e}") from None
        part: Part | Exception
        try:
            part = Part([self._element(*one) for one in inputs], [self._element(*one) for one in outputs])
            for device in session.devices:
                device.synchronize()  # another session's thread reads what this one has computed
        except (Poisoned, BeyondStorage, StaleTensorError) as e:
            part = RuntimeError(e.report["message"] if isinstance(e, Poisoned) else str(e))
        except TypeError as e:
            raise BadRecord(f"a tensor of a collective: {e}") from None
        else:
            session.note_writes([id for id, _ in outputs])
        try:
            self._meetings.meet(
                session.sender, (group, size, rank, number), agreed, part, timeout_s, self._is_over
            )
        except BadRecord:
            raise
        except Exception as e:
            self._complain(agreed.kind if agreed.kind != "copy" else "copy_", e)

    def _element(self, id: Any, wire: Any) -> torch.Tensor:
        geom, slot = self._session.geometry(wire), self._session.slot(id)
        within(slot, geom)
        return slot.view(geom)

    def _complain(self, name: str, error: Exception) -> None:
        named = f"aten::{name}" if name == "copy_" else f"c10d::{name}"
        self._session.complain(report_of(named, error, self._session.number), error)

    def link(self, group: Any, workers: Any, rank: Any) -> tuple[str, None]:
        """Answer LINK."""
        if not isinstance(group, bytes) or len(group) != GROUP_BYTES or not isinstance(workers, list):
            raise BadRecord(f"a group of {workers!r:.80}")
        meetings, links = self._meetings, self._links
        if not isinstance(meetings, SpreadMeetings) or links is None:
            return "this worker is linked to no other", None
        known = all(name == links.name or links.is_name(name) for name in workers)
        if not known or type(rank) is not int or not 0 <= rank < len(workers) <= MAX_RANKS:
            raise BadRecord(f"rank {rank!r:.40} of {workers!r:.80}")
        found = links.reach({*workers} - {links.name}, self._is_over)
        if isinstance(found, str):
            return found, None
        return meetings.spread(self._session.sender, group, rank, [found.get(name) for name in workers]), None

    # -- from one rank to another

    def join(self, box: Any) -> tuple[list[str] | None, None]:
        """Answer JOIN."""
        self._messages.join(self._session.sender, box)
        return self._links.linked(self._is_over) if self._links is not None else None, None

    def _post(self, box: Any, name: Any, id: Any, wire: Any) -> None:
        """Execute POST: keep a copy of a tensor until another rank takes it."""
        content: Slot | str
        try:
            content = _copied(self._element(id, wire), self._session.slot(id).device)
        except BadRecord:
            raise
        except Poisoned as e:  # its client has been told
            content = str(e.report["message"])
        except Exception as e:
            content = str(e)
            self._complain("send", e)
        self._messages.post(self._session.sender, box, name, content)

    def _withdraw(self, box: Any, name: Any) -> None:
        """Execute WITHDRAW."""
        self._messages.withdraw(self._session.sender, box, name)

    def _take(self, box: Any, name: Any, id: Any, wire: Any, ranks: Any, timeout_s: Any) -> None:
        """Execute TAKE: wait for what another rank sends."""
        source, here = _checked(box, name, ranks, timeout_s)
        with self._receiving():
            target = self._session.target(id, wire)
            sent = self._messages.take(box, name, (source, here), timeout_s, self._is_over)
            try:
                self._fill(target, sent, source)
            finally:
                if self._session.shared.leave(sent):
                    sent.device.give_storage(sent.nbytes)

    def _fetch(self, peer: Any, box: Any, name: Any, id: Any, wire: Any, ranks: Any, timeout_s: Any) -> None:
        """Execute FETCH: wait for what a rank at another worker sends."""
        between = _checked(box, name, ranks, timeout_s)
        with self._receiving():
            target = self._session.target(id, wire)
            links, far = self._linked(peer)
            expected = Elements(target.dtype, target.numel())
            found = far.fetch(
                links.get(peer, self._is_over), (box, name), between, expected, timeout_s, self._is_over
            )
            target.copy_(found.view(target.shape))

    @contextlib.contextmanager
    def _receiving(self) -> Iterator[None]:
        """Complain of what fails meanwhile: the target is not there, or nothing comes. Raises BadRecord."""
        try:
            yield
        except BadRecord:
            raise
        except Poisoned as e:
            self._session.complain_of_target(e)
        except Exception as e:
            self._complain("recv_", e)

    def is_there(self, peer: Any, box: Any, name: Any) -> tuple[bool, None]:
        """Answer IS_THERE."""
        _checked(box, name, (0, 0), 0)
        links, far = self._linked(peer)
        try:
            return far.has(links.get(peer, self._is_over), (box, name), self._is_over), None
        except RuntimeError:  # who receives it hears of it
            return True, None

    def _linked(self, peer: Any) -> tuple[PeerLinks, FarMessages]:
        if self._links is None or self._far is None or not self._links.is_name(peer):
            raise BadRecord(f"a worker named {peer!r:.60}")
        return self._links, self._far

    def _fill(self, target: torch.Tensor, sent: Slot, source: int) -> None:
        values = sent.memory()
        assert values is not None, "what was sent has memory"
        if values.dtype != target.dtype or values.numel() != target.numel():
            raise ValueError(
                f"rank {source} sends {values.numel()} elements of {values.dtype} to a tensor of "
                f"{target.numel()} of {target.dtype}"
            )
        target.copy_(values.reshape(target.shape))
        sent.device.synchronize()  # its memory is about to be another tensor's

    def arrived(self, box: Any, name: Any) -> tuple[bool, None]:
        """Answer ARRIVED."""
        if not isinstance(box, bytes) or not isinstance(name, bytes):
            raise BadRecord(f"a message named {name!r:.60}")
        return self._messages.has(box, name), None


def _checked(box: Any, name: Any, ranks: Any, timeout_s: Any) -> tuple[int, int]:
    """The ranks between which a message goes. Raises BadRecord."""
    try:
        source, here = ranks
        if not isinstance(box, bytes) or not isinstance(name, bytes) or not 0 <= timeout_s < 1e9:
            raise ValueError("a place that cannot be")
    except (TypeError, ValueError) as e:
        raise BadRecord(f"a message of {ranks!r:.80}: {e}") from None
    return source, here


def _copied(source: torch.Tensor, device: Device) -> Slot:
    """A storage with a copy of a tensor. Raises torch.OutOfMemoryError."""
    nbytes = source.numel() * source.itemsize
    device.take(rounded(nbytes))
    try:
        memory = source.clone(memory_format=torch.contiguous_format)
        device.synchronize()  # another session's thread reads it
    except BaseException:
        device.give_storage(nbytes)
        raise
    return Slot(memory, device, nbytes)

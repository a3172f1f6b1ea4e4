"""Whether a worker's memory is on its devices or in host memory, and who may touch it meanwhile.

A frame's commands run inside of the gate. Parking closes the gate, so that every session rests between two frames;
then memory is copied to the arena, and let go. A frame that needs it asks for it and waits. Once it is to be there
again, each piece comes when it is first used, the others in the background.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from .arena_memory import ArenaFull, ArenaMemory, Extent
from .device import Device
from .gate import Gate
from .graph_fusion import while_nothing_is_compiled
from .held_arrays import COMPUTE_TIMEOUT_S, HeldArray
from .shared_storages import SharedBlock, SharedStorages
from .storages import Slot, whole

log = logging.getLogger(__name__)

#: How long sessions may take to come between two frames, in seconds: an upload may arrive slowly.
_REST_TIMEOUT_S = 10.0
#: The bytes that are copied while frames wait, where the worker goes on.
_PIECE_BYTES = 4 << 20


#: A tensor on a piece of memory: dtype, offset, size and stride.
_Layout = tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]]


#: What is on memory.
User = Slot | SharedBlock | HeldArray


def clear(device: Device, only_unused: bool = False) -> None:
    """As ``device.clear_memory``; where that fails, the log says so, for the driver clears memory as well."""
    try:
        device.clear_memory(only_unused)
    except Exception as e:  # CUDA's errors are RuntimeError, AcceleratorError and others
        log.warning("the memory of %s is not cleared by its worker: %s", device.spec.name, e)


class HasMemory(Protocol):
    """A session. ``has_copies``: whether any of its memory may have a copy."""

    has_copies: bool

    @property
    def storages(self) -> Mapping[int, Slot | HeldArray]:
        """What is on its memory, by its ids."""


class CannotPark(Exception):
    """The worker's memory cannot be parked now; the message is the reason."""


class Copy:
    """A copy in the arena of a piece of memory. A write to the memory makes it invalid."""

    __slots__ = ("device", "extents", "lock", "nbytes", "residence", "users", "valid")

    def __init__(
        self, residence: Residence, device: Device, nbytes: int, extents: tuple[Extent, ...]
    ) -> None:
        self.residence = residence
        self.device = device
        self.nbytes = nbytes
        self.extents = extents
        self.valid = True
        self.lock = threading.Lock()
        #: what is on the memory, with the layout of each: filled while the memory is away
        self.users: list[tuple[User, _Layout]] = []

    def layout_of(self, user: User) -> _Layout:
        """The tensor that a storage has on this memory, which is away."""
        return next(layout for one, layout in self.users if one is user)

    def fetch(self) -> None:
        """Bring the memory back to its device, if it is still away."""
        with self.lock:
            users, self.users = self.users, []
            users = [(user, layout) for user, layout in users if user.copy is self]
            if not users:
                return
            memory = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device.torch_device)
            self.residence.arena.load(self.device, memory, self.extents)
            storage = memory.untyped_storage()
            for user, (dtype, *layout) in users:
                user.base = torch.empty(0, dtype=dtype, device=memory.device).set_(storage, *layout)


class Piece:
    """A torch storage of the worker, and what is on it."""

    __slots__ = ("device", "storage", "users")

    def __init__(self, device: Device, storage: torch.UntypedStorage) -> None:
        self.device = device
        self.storage = storage
        self.users: list[User] = []

    @property
    def copy(self) -> Copy | None:
        """The copy of it that is up to date, if there is one."""
        first = self.users[0].copy
        agreed = first is not None and first.valid and all(user.copy is first for user in self.users)
        return first if agreed else None

    @property
    def is_used(self) -> bool:
        """Whether anything is on it still, and it is on its device."""
        return any(user.base is not None for user in self.users)

    def read(self, at: int, into: memoryview) -> None:
        """Copy the bytes from ``at`` on into host memory."""
        memory = whole(self.storage)
        there = self.device.in_place(memory)
        if there is None:
            self.device.copy_to_host(memory[at : at + len(into)], into)
        else:
            into[:] = there[at : at + len(into)]


class Residence:
    """Parks the memory of all sessions of a worker, and brings it back. Its methods are called by one thread."""

    def __init__(self, devices: Callable[[], Sequence[Device]], shared: SharedStorages) -> None:
        self.gate = Gate()
        self.arena = ArenaMemory()
        self._devices = devices
        self._shared = shared
        self._lock = threading.Lock()
        self._sessions: list[HasMemory] = []
        self._copies: set[Copy] = set()
        self._clean_at = -1
        self._fetching: threading.Thread | None = None
        self._hold = threading.Event()
        #: whether every session rests until :meth:`go_on`
        self._rests = False

    def join(self, session: HasMemory) -> None:
        """A session begins."""
        with self._lock:
            self._sessions.append(session)
            session.has_copies = bool(self._copies)

    def leave(self, session: HasMemory) -> None:
        """A session has ended."""
        with self._lock:
            self._sessions.remove(session)

    @property
    def is_clean(self) -> bool:
        """Whether nothing has used memory since all of it was copied."""
        return self._clean_at == self.gate.uses

    def nbytes(self) -> int:
        """The bytes of memory that a copy of everything takes now, at most."""
        return sum(device.allocated for device in self._devices()) + (1 << 20)

    # -- parking

    @torch.inference_mode()
    def park(self) -> int:
        """Copy what has no copy yet, and let all memory go. Return the bytes that are in the arena.

        Raises :class:`CannotPark`; then everything is as it was.
        """
        if self.gate.parked:
            return self._in_use()
        self._stop_fetching()
        if not self.gate.close(_REST_TIMEOUT_S):
            self._fetch_rest()
            raise CannotPark("it computes, or an upload to it has not arrived whole")
        parked = False
        try:
            for device in self._devices():
                device.synchronize()
            self._drop_unused()  # first: what was written needs the room of its former copy
            pieces = list(self.pieces(COMPUTE_TIMEOUT_S).values())
            for piece in pieces:
                if piece.copy is None:
                    copy = self._new_copy(piece)
                    self._copy_from(piece, copy, 0)
            for piece in pieces:
                self._let_go(piece)
            parked = True
            with while_nothing_is_compiled() as quiet:
                for device in self._devices() if quiet else ():
                    clear(device, only_unused=True)
        except ArenaFull as e:
            raise CannotPark(f"the host memory for it does not suffice: {e}") from None
        finally:
            self.gate.open(parked)
            if not parked:
                self._fetch_rest()
        for device in self._devices():
            device.release_memory()
        return self._in_use()

    @torch.inference_mode()
    def resume(self) -> None:
        """Let sessions use their memory again: each piece comes when it is used, or before that."""
        if not self.gate.parked:
            return
        for block in self._shared.blocks():
            if block.copy is not None:
                block.copy.fetch()
        self.gate.open(parked=False)
        self._fetch_rest()

    # -- rest

    def rest(self) -> None:
        """Let every session rest between two frames until :meth:`go_on`, and move no memory.

        Raises :class:`CannotPark`; then everything goes on.
        """
        self._stop_fetching()
        if not self.gate.close(_REST_TIMEOUT_S):
            self.go_on(was_closed=False)
            raise CannotPark("it computes, or an upload to it has not arrived whole")
        self._rests = True

    def clear(self, timeout_s: float) -> bool:
        """Zero all memory, at the worker's end: no frame runs any more.

        False where a frame computes for too long, memory is being fetched, or a graph is being compiled.
        """
        self._hold.set()
        fetching = self._fetching
        if fetching is not None:
            fetching.join(timeout_s)
            if fetching.is_alive():
                return False
        if not self._rests and not self.gate.close(timeout_s):
            return False
        with while_nothing_is_compiled() as quiet:
            for device in self._devices() if quiet else ():
                clear(device)
        return quiet

    def go_on(self, was_closed: bool = True) -> None:
        """End the rest; what is parked stays parked."""
        self._rests = False
        if was_closed:
            self.gate.open()
        if not self.gate.parked:
            self._fetch_rest()

    def _fetch_rest(self) -> None:
        self._hold.clear()
        self._fetching = threading.Thread(target=self._fetch_all, name="resume", daemon=True)
        self._fetching.start()

    @torch.inference_mode()
    def _fetch_all(self) -> None:
        for copy in list(self._copies):
            if self._hold.is_set():
                return
            copy.fetch()

    def _stop_fetching(self) -> None:
        if self._fetching is not None:
            self._hold.set()
            self._fetching.join()
            self._fetching = None

    def until_resident(self) -> None:
        """Wait until all memory is back."""
        if self._fetching is not None:
            self._fetching.join()

    # -- copies

    @torch.inference_mode()
    def clean(self) -> bool:
        """Copy what has no copy yet while the sessions go on, in small pieces. Return whether everything has one.

        Whatever is written meanwhile has none. Raises :class:`CannotPark`.
        """
        self.until_resident()
        uses = self.gate.uses
        if not self.alone():
            return False
        try:
            todo = [piece for piece in self.pieces().values() if piece.copy is None]
            self._drop_unused()
        finally:
            self.gate.open()
        for piece in todo:
            if not self._copy_in_turns(piece):
                return False
        self._clean_at = uses
        return self.is_clean

    def alone(self) -> bool:
        """Let no frame in until the gate is opened. False if it is parked, or computes for long."""
        return not self.gate.parked and self.gate.close(_REST_TIMEOUT_S)

    def _copy_in_turns(self, piece: Piece) -> bool:
        at, copy = 0, None
        while copy is None or at < copy.nbytes:
            if not self.alone():
                return False
            try:
                if copy is None:
                    if all(user.base is None for user in piece.users):
                        return True
                    copy = self._new_copy(piece)
                elif not copy.valid:
                    return False
                at += self._copy_from(piece, copy, at, _PIECE_BYTES)
            except ArenaFull as e:
                raise CannotPark(f"the host memory for it does not suffice: {e}") from None
            finally:
                self.gate.open()
            if not copy.nbytes:
                break
        return True

    def forget(self) -> None:
        """Give the arena's chunks up, and every copy in them. Not while parked."""
        self.until_resident()
        if not self.alone():
            raise CannotPark("it is parked, or computes")
        try:
            for user in self._users():
                user.copy = None
            self._copies.clear()
            self._clean_at = -1
            self.arena.give_back()
        finally:
            self.gate.open()

    def _new_copy(self, piece: Piece) -> Copy:
        return self.mark(piece, self.arena.take(piece.storage.nbytes()))

    def mark(self, piece: Piece, extents: tuple[Extent, ...] = ()) -> Copy:
        """Note from now on whether a piece is written to. Nobody else may be inside of the gate."""
        copy = Copy(self, piece.device, piece.storage.nbytes(), extents)
        self._copies.add(copy)
        with self._lock:
            for session in self._sessions:
                session.has_copies = True
        for user in piece.users:
            user.copy = copy
        return copy

    def _copy_from(self, piece: Piece, copy: Copy, at: int, most: int | None = None) -> int:
        memory = whole(piece.storage)
        done = 0
        most = memory.numel() - at if most is None else most
        while done < most and at + done < memory.numel():
            done += self.arena.store(piece.device, memory, copy.extents, at + done, most - done)
        return done

    def unmark(self, marks: Collection[Copy]) -> None:
        """Forget what :meth:`mark` returned."""
        for user in self._users():
            if user.copy in marks:
                user.copy = None
        self._copies.difference_update(marks)

    def ordinal(self, device: Device) -> int:
        """The position of a device in the lease."""
        return list(self._devices()).index(device)

    def _drop_unused(self) -> None:
        """Free the copies that are out of date, or of memory that is gone."""
        used = {user.copy for user in self._users() if user.copy is not None and user.copy.valid}
        for copy in self._copies - used:
            self.arena.give(copy.extents)
        for user in self._users():
            if user.copy is not None and user.copy not in used:
                user.copy = None
        self._copies &= used

    def _let_go(self, piece: Piece) -> None:
        copy = piece.users[0].copy
        assert copy is not None, "it has been copied"
        for user in piece.users:
            base = user.base
            assert base is not None, "it is here"
            copy.users.append((user, _layout(base)))
            user.base = None
            if isinstance(user, Slot):
                user.views.clear()

    def _users(self) -> Iterator[User]:
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            yield from list(session.storages.values())
        yield from self._shared.blocks()

    def pieces(self, timeout_s: float = 0.0) -> dict[int, Piece]:
        """All memory that is on the devices, by its keys in a :class:`.lease_state.LeaseState`.

        Raises :class:`CannotPark` if some of it is no storage's, or is being computed for longer than ``timeout_s``.
        """
        found: dict[int, Piece] = {}
        until = time.monotonic() + timeout_s
        for user in self._users():
            if isinstance(user, Slot) and user.saved is not None:
                raise CannotPark("a recurrent network waits for its backward pass")
            try:
                if isinstance(user, HeldArray):
                    user.wait(until)
                base = user.base
            except TimeoutError:
                raise CannotPark("it computes") from None
            if base is None:
                continue
            storage = base.untyped_storage()
            key = storage._cdata if not isinstance(user, HeldArray) else key_of(user)
            found.setdefault(key, Piece(user.device, storage)).users.append(user)
        return found

    def _in_use(self) -> int:
        return self.arena.total - self.arena.free


def key_of(held: HeldArray) -> int:
    """The key of an array's memory: no storage of torch has that address while both exist."""
    return id(held)


def _layout(base: torch.Tensor) -> _Layout:
    return base.dtype, int(base.storage_offset()), tuple(base.shape), tuple(base.stride())

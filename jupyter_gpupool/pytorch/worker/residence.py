"""Whether a worker's memory is on its devices or in host memory, and who may touch it meanwhile.

A frame's commands run inside of the gate. Parking closes the gate, so that every session rests between two frames;
then memory is copied to the arena, and let go. A frame that needs it asks for it and waits. Once it is to be there
again, each piece comes when it is first used, the others in the background.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from jupyter_gpupool.pytorch.protocol import commands as codes

from .arena_memory import ArenaFull, ArenaMemory, Extent
from .device import Device
from .shared_storages import SharedBlock, SharedStorages
from .storages import Slot, whole

if TYPE_CHECKING:
    from .executor import WorkerSession

#: Commands that need nothing of a device's memory.
_NEEDLESS = frozenset(
    [
        *(codes.FREE, codes.WAIT, codes.GET_RNG, codes.DONE, codes.AWAIT, codes.ELAPSED, codes.MEMORY),
        *(codes.PROPERTIES, codes.READINGS, codes.TRACE),
    ]
)
#: How long sessions may take to come between two frames, in seconds: an upload may arrive slowly.
_REST_TIMEOUT_S = 10.0
#: The bytes that are copied while frames wait, where the worker goes on.
_PIECE_BYTES = 4 << 20


#: A tensor on a piece of memory: dtype, offset, size and stride.
_Layout = tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]]


class CannotPark(Exception):
    """The worker's memory cannot be parked now; the message is the reason."""


def needs_memory(commands: Any) -> bool:
    """Whether a frame's commands use the devices' memory, or may."""
    if not isinstance(commands, list):
        return True
    i = 0
    while i < len(commands):
        code = commands[i]
        if code not in _NEEDLESS:
            return True
        i += 1 + codes.FIELDS[code]
    return False


class Gate:
    """Frames run inside; whoever closes it is alone. While ``parked`` is set, only frames that need nothing go in."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._inside = 0
        self._closed = False
        self.parked = False
        self._parks = 0
        #: called when a frame waits for what is parked
        self.on_wanted: Callable[[], None] = lambda: None
        #: when a frame last needed memory, on a monotonic clock
        self.used_at = time.monotonic()
        #: how many frames have
        self.uses = 0

    def enter(self, commands: Any = None) -> None:
        """Go in with a frame, or wait. ``commands`` None: it needs memory."""
        with self._lock:  # a condition's own methods would take several times as long
            if not self._closed and not self.parked:
                self._inside += 1
                self.uses += 1
                self.used_at = time.monotonic()
                return
            needs = commands is None or not self.parked or needs_memory(commands)
            asked = 0
            while self._closed or (self.parked and needs):
                if self.parked and asked != self._parks:  # also if it was here, and has gone again, meanwhile
                    asked = self._parks
                    self.on_wanted()
                self._changed.wait()
            self._inside += 1
            if needs:
                self.uses += 1
                self.used_at = time.monotonic()

    def leave(self) -> None:
        """Come out."""
        with self._lock:
            self._inside -= 1
            if self._closed and not self._inside:
                self._changed.notify_all()

    def close(self, timeout_s: float) -> bool:
        """Let nobody in, and wait until nobody is inside. False, and open again, if that takes too long."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._closed, timeout_s):
                return False
            self._closed = True
            if self._changed.wait_for(lambda: not self._inside, timeout_s):
                return True
            self._closed = False
            self._changed.notify_all()
            return False

    def open(self, parked: bool | None = None) -> None:
        """Let frames in again."""
        with self._changed:
            self._closed = False
            if parked is not None:
                self._parks += parked and not self.parked
                self.parked = parked
            self._changed.notify_all()


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
        self.users: list[tuple[Slot | SharedBlock, _Layout]] = []

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


class _Piece:
    """A torch storage of the worker, and what is on it."""

    __slots__ = ("device", "storage", "users")

    def __init__(self, device: Device, storage: torch.UntypedStorage) -> None:
        self.device = device
        self.storage = storage
        self.users: list[Slot | SharedBlock] = []

    @property
    def copy(self) -> Copy | None:
        """The copy of it that is up to date, if there is one."""
        first = self.users[0].copy
        agreed = first is not None and first.valid and all(user.copy is first for user in self.users)
        return first if agreed else None


class Residence:
    """Parks the memory of all sessions of a worker, and brings it back. Its methods are called by one thread."""

    def __init__(self, devices: Callable[[], Sequence[Device]], shared: SharedStorages) -> None:
        self.gate = Gate()
        self.arena = ArenaMemory()
        self._devices = devices
        self._shared = shared
        self._lock = threading.Lock()
        self._sessions: list[WorkerSession] = []
        self._copies: set[Copy] = set()
        self._clean_at = -1
        self._fetching: threading.Thread | None = None
        self._hold = threading.Event()

    def join(self, session: WorkerSession) -> None:
        """A session begins."""
        with self._lock:
            self._sessions.append(session)
            session.has_copies = bool(self._copies)

    def leave(self, session: WorkerSession) -> None:
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
            pieces = self._pieces()
            for piece in pieces:
                if piece.copy is None:
                    copy = self._new_copy(piece)
                    self._copy_from(piece, copy, 0)
            for piece in pieces:
                self._let_go(piece)
            parked = True
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
        if not self._alone():
            return False
        try:
            todo = [piece for piece in self._pieces() if piece.copy is None]
            self._drop_unused()
        finally:
            self.gate.open()
        for piece in todo:
            if not self._copy_in_turns(piece):
                return False
        self._clean_at = uses
        return self.is_clean

    def _alone(self) -> bool:
        return not self.gate.parked and self.gate.close(_REST_TIMEOUT_S)

    def _copy_in_turns(self, piece: _Piece) -> bool:
        at, copy = 0, None
        while copy is None or at < copy.nbytes:
            if not self._alone():
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
        if not self._alone():
            raise CannotPark("it is parked, or computes")
        try:
            for piece in self._pieces():
                for user in piece.users:
                    user.copy = None
            self._copies.clear()
            self._clean_at = -1
            self.arena.give_back()
        finally:
            self.gate.open()

    def _new_copy(self, piece: _Piece) -> Copy:
        nbytes = piece.storage.nbytes()
        copy = Copy(self, piece.device, nbytes, self.arena.take(nbytes))
        self._copies.add(copy)
        with self._lock:
            for session in self._sessions:
                session.has_copies = True
        for user in piece.users:
            user.copy = copy
        return copy

    def _copy_from(self, piece: _Piece, copy: Copy, at: int, most: int | None = None) -> int:
        memory = whole(piece.storage)
        done = 0
        most = memory.numel() - at if most is None else most
        while done < most and at + done < memory.numel():
            done += self.arena.store(piece.device, memory, copy.extents, at + done, most - done)
        return done

    def _drop_unused(self) -> None:
        """Free the copies that are out of date, or of memory that is gone."""
        used = {user.copy for user in self._users() if user.copy is not None and user.copy.valid}
        for copy in self._copies - used:
            self.arena.give(copy.extents)
        for user in self._users():
            if user.copy is not None and user.copy not in used:
                user.copy = None
        self._copies &= used

    def _let_go(self, piece: _Piece) -> None:
        copy = piece.users[0].copy
        assert copy is not None, "it has been copied"
        for user in piece.users:
            base = user.base
            assert base is not None, "it is here"
            copy.users.append((user, _layout(base)))
            user.base = None
            if isinstance(user, Slot):
                user.views.clear()

    def _users(self) -> Iterator[Slot | SharedBlock]:
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            yield from list(session.storages.values())
        yield from self._shared.blocks()

    def _pieces(self) -> list[_Piece]:
        """All memory that is on the devices. Raises :class:`CannotPark` if some of it is no storage's."""
        found: dict[int, _Piece] = {}
        for user in self._users():
            if isinstance(user, Slot) and user.saved is not None:
                raise CannotPark("a recurrent network waits for its backward pass")
            if user.base is None:
                continue
            storage = user.base.untyped_storage()
            found.setdefault(storage._cdata, _Piece(user.device, storage)).users.append(user)
        return list(found.values())

    def _in_use(self) -> int:
        return self.arena.total - self.arena.free


def _layout(base: torch.Tensor) -> _Layout:
    return base.dtype, int(base.storage_offset()), tuple(base.shape), tuple(base.stride())

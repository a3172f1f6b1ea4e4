"""The whole state of a worker, apart from its memory's bytes: taken from one worker, and put into another.

What a lease is, is a table of memory and what its sessions know of it. :func:`take` describes that in plain values,
which state_stream.py carries with the bytes; nothing is pickled. Compiled code is not part of it: it is compiled again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from jupyter_gpupool.pytorch.protocol.sizes import needed_bytes, rounded

from .device import Device, Event
from .executor import WorkerSession
from .held_arrays import COMPUTE_TIMEOUT_S, HeldArray
from .other_frameworks import OtherSession
from .plain_form import checked
from .residence import key_of as key_of_held
from .shared_storages import SharedBlock, SharedStorages
from .storages import Slot, whole
from .templates import BadRecord, dtype_named

if TYPE_CHECKING:
    from .residence import Copy, User

#: Version of the form, increased with each change. A worker refuses any other.
VERSION = 2


class Unparkable(Exception):
    """The worker holds something that cannot be taken out of it now; the message is what, and when it can be."""


class BadState(Exception):
    """What was received is no state of a worker for these devices."""


@dataclass(frozen=True)
class Layout:
    """A tensor on a piece of memory: size, stride and offset in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: str


@dataclass(frozen=True)
class StorageState:
    """A storage: the key of its memory and the tensor on it, or the report of why there is none."""

    id: int
    device: int
    nbytes: int
    memory: int | None
    layout: Layout | None
    poison: Any
    #: the position of its block among those that several sessions use
    block: int | None


@dataclass(frozen=True)
class BlockState:
    """Memory that a session sent to others, and the positions of the sessions whose sending waits to be opened."""

    name: bytes
    device: int
    nbytes: int
    memory: int
    layout: Layout
    #: -1 for a session that has ended
    senders: tuple[int, ...]


@dataclass(frozen=True)
class TemplateState:
    """A template as its client defined it. ``previous``: it is from before the last RESET."""

    id: int
    previous: bool
    definition: Any


@dataclass(frozen=True)
class GraphState:
    """A graph as its client defined it, and how far it was on the way to being compiled."""

    id: int
    definition: Any
    calls_left: int
    compiled: bool


@dataclass(frozen=True)
class GeneratorState:
    """A random generator."""

    id: int
    device: int
    state: bytes


@dataclass(frozen=True)
class EventState:
    """An event, as the seconds from it to the moment when the state was taken."""

    id: int
    device: int
    age_s: float


@dataclass(frozen=True)
class SessionState:
    """What a worker keeps for one client. ``identity`` is the caller's; it finds its client again by it."""

    identity: Any
    #: the client's number of each device, and the device's position in the lease
    devices: tuple[tuple[int, int], ...]
    storages: tuple[StorageState, ...]
    templates: tuple[TemplateState, ...]
    graphs: tuple[GraphState, ...]
    generators: tuple[GeneratorState, ...]
    events: tuple[EventState, ...]
    #: operator, device's number, seconds from its start to the moment when the state was taken, duration
    calls: tuple[tuple[str, int, float, float], ...] | None


@dataclass(frozen=True)
class ArrayState:
    """An array of a session of another framework, by the key of its memory."""

    id: int
    memory: int


@dataclass(frozen=True)
class OtherState:
    """What a worker keeps for a client of another framework. ``rest`` is that framework's."""

    identity: Any
    framework: str
    #: as those of :class:`SessionState`
    devices: tuple[tuple[int, int], ...]
    arrays: tuple[ArrayState, ...]
    rest: Any


@dataclass(frozen=True)
class LeaseState:
    """The whole: devices are counted as in the lease, memory by any keys."""

    version: int
    #: the release of PyTorch, since definitions are its operators' names
    torch: str
    #: seconds since the epoch
    taken_at: float
    threads: int
    #: the default generator of each device
    generators: tuple[bytes, ...]
    blocks: tuple[BlockState, ...]
    sessions: tuple[SessionState, ...]
    others: tuple[OtherState, ...]


@dataclass(frozen=True)
class Memory:
    """A piece of a device's memory, as bytes."""

    device: int
    bytes: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.bytes.numel()

    def read(self, device: Device, offset: int, into: memoryview) -> None:
        """Copy the bytes from ``offset`` on into host memory."""
        device.copy_to_host(self.bytes[offset : offset + len(into)], into)

    def in_place(self, device: Device) -> memoryview | None:
        """All of it, where the host can read and write it in place."""
        return device.in_place(self.bytes)


@dataclass(frozen=True)
class AwayMemory:
    """A piece of memory that is away from its device: only its copy in host memory is there."""

    device: int
    copy: Copy

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.copy.nbytes

    def read(self, device: Device, offset: int, into: memoryview) -> None:
        """Copy the bytes from ``offset`` on."""
        self.copy.residence.arena.read(self.copy.extents, offset, into)

    def in_place(self, device: Device) -> memoryview | None:
        """None: it is in several places."""
        return None


# -- out of a worker


class _Taking:
    """Numbers memory as it is met: two storages may be on the same."""

    def __init__(self, devices: Sequence[Device], key_of: Callable[[torch.UntypedStorage], int]) -> None:
        self.ordinal = {d: k for k, d in enumerate(devices)}
        self.memories: dict[int, Memory | AwayMemory] = {}
        self.blocks: dict[SharedBlock, int] = {}
        self._key_of = key_of
        self._until = time.monotonic() + COMPUTE_TIMEOUT_S

    def tensor(self, user: Slot | SharedBlock) -> tuple[int, Layout]:
        """The key of the memory that a storage is on, and the tensor on it."""
        base = user.base
        if base is None:
            assert user.copy is not None, "it is on its device or away"
            return self._away(user, user.copy)
        storage = base.untyped_storage()
        key = self._key_of(storage)
        if key not in self.memories:
            self.memories[key] = Memory(self.ordinal[user.device], whole(storage))
        layout = Layout(
            tuple(base.shape),
            tuple(base.stride()),
            int(base.storage_offset()),
            str(base.dtype).removeprefix("torch."),
        )
        return key, layout

    def _away(self, user: User, copy: Copy) -> tuple[int, Layout]:
        key = id(copy)  # no storage of torch has its address while both exist
        self.memories.setdefault(key, AwayMemory(self.ordinal[copy.device], copy))
        dtype, offset, size, stride = copy.layout_of(user)
        return key, Layout(size, stride, offset, str(dtype).removeprefix("torch."))

    def array(self, id: int, held: HeldArray) -> ArrayState | None:
        try:
            held.wait(self._until)
            base = held.base
        except TimeoutError:
            raise Unparkable("it computes") from None
        if base is not None:
            self.memories[key_of_held(held)] = Memory(
                self.ordinal[held.device], whole(base.untyped_storage())
            )
            return ArrayState(id, key_of_held(held))
        return None if held.copy is None else ArrayState(id, self._away(held, held.copy)[0])

    def storage(self, id: int, slot: Slot) -> StorageState:
        if slot.saved is not None:
            raise Unparkable("a recurrent network waits for its backward pass")
        block = None if slot.shared is None else self.blocks[slot.shared]
        has_none = slot.base is None and slot.copy is None
        memory, layout = (None, None) if has_none else self.tensor(slot)
        return StorageState(id, self.ordinal[slot.device], slot.nbytes, memory, layout, slot.poison, block)


def _by_address(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)


@torch.inference_mode()
def take(
    devices: Sequence[Device],
    sessions: Sequence[tuple[Any, WorkerSession]],
    shared: SharedStorages,
    key_of: Callable[[torch.UntypedStorage], int] = _by_address,
    others: Sequence[tuple[Any, OtherSession]] = (),
) -> tuple[LeaseState, dict[int, Memory | AwayMemory]]:
    """The state of a worker whose sessions rest, each with its identity; and the memory that it is on, by key.

    Nothing is copied, so the memory is to be read before the sessions go on. Raises :class:`Unparkable`.
    """
    for device in devices:
        device.synchronize()
    now = time.perf_counter()
    taking = _Taking(devices, key_of)
    position = {session.sender: k for k, (_, session) in enumerate(sessions)}
    blocks: list[BlockState] = []
    for block in shared.blocks():
        memory, layout = taking.tensor(block)
        taking.blocks[block] = len(blocks)
        senders = tuple(position.get(sender, -1) for sender in block.senders)
        blocks.append(
            BlockState(block.name, taking.ordinal[block.device], block.nbytes, memory, layout, senders)
        )
    state = LeaseState(
        VERSION,
        _release(),
        time.time(),
        torch.get_num_threads(),
        tuple(d.generator.get_state().numpy().tobytes() for d in devices),
        tuple(blocks),
        tuple(_session(identity, session, taking, now) for identity, session in sessions),
        tuple(_other(identity, session, taking) for identity, session in others),
    )
    return state, taking.memories


def _other(identity: Any, session: OtherSession, taking: _Taking) -> OtherState:
    arrays = [taking.array(id, held) for id, held in session.storages.items()]
    return OtherState(
        identity,
        session.framework,
        tuple((number, taking.ordinal[device]) for number, device in session.numbered.items()),
        tuple(array for array in arrays if array is not None),
        session.executes.describe(),
    )


def _session(identity: Any, session: WorkerSession, taking: _Taking, now: float) -> SessionState:
    ordinal = taking.ordinal
    generators, events = session.handles.named()
    calls = session.traced()
    return SessionState(
        identity,
        tuple((number, ordinal[device]) for number, device in session.numbered.items()),
        tuple(taking.storage(id, slot) for id, slot in session.storages.items()),
        tuple(TemplateState(id, previous, t.definition) for id, previous, t in session.templates()),
        tuple(
            GraphState(id, g.graph.definition, g.calls_left, g.compiled) for id, g in session.graphs.defined()
        ),
        tuple(
            GeneratorState(id, ordinal[device], g.get_state().numpy().tobytes())
            for id, (device, g) in generators.items()
        ),
        tuple(_events(events, ordinal)),
        None
        if calls is None
        else tuple((name, number, now - start, took) for name, number, start, took in calls),
    )


def _events(
    events: Mapping[int, tuple[Device, Event]], ordinal: Mapping[Device, int]
) -> Iterator[EventState]:
    for device, k in ordinal.items():
        of_device = {id: event for id, (home, event) in events.items() if home is device}
        for id, age_s in zip(of_device, device.ages_s(list(of_device.values()))) if of_device else ():
            yield EventState(id, k, age_s)


def _release() -> str:
    return ".".join(torch.__version__.split("+")[0].split(".")[:2])


# -- into a worker


@torch.inference_mode()
def put(
    plain_state: Any,
    memories: Mapping[int, Memory],
    devices: Sequence[Device],
    shared: SharedStorages,
    new_session: Callable[[Any, dict[int, Device]], WorkerSession],
    new_other: Callable[[Any, dict[int, Device], str], OtherSession] | None = None,
) -> list[WorkerSession]:
    """Fill an empty worker with a state, as :func:`~.plain_form.plain` made it plain, on memory that has its bytes.

    ``new_session(identity, devices by the client's numbers)`` creates an empty session, and ``new_other`` one of a
    framework. Raises :class:`BadState`; then the worker is of no use any more.
    """
    try:
        state = checked(LeaseState, plain_state)
        if state.version != VERSION:
            raise ValueError(f"version {state.version}, where {VERSION} is needed")
        if state.torch != _release():
            raise ValueError(f"PyTorch {state.torch}, where {_release()} is needed")
        if len(state.generators) != len(devices) or not 0 < state.threads <= 1024:
            raise ValueError(f"{len(state.generators)} devices and {state.threads} threads")
        putting = _Putting(state, memories, devices, shared)
        created = putting.sessions(new_session)
        putting.others(new_other)
        return created
    except (BadRecord, ValueError, TypeError, RuntimeError) as e:
        raise BadState(f"this is no state for this worker: {e}") from e


class _Putting:
    def __init__(
        self,
        state: LeaseState,
        memories: Mapping[int, Memory],
        devices: Sequence[Device],
        shared: SharedStorages,
    ) -> None:
        self._state = state
        self._memories = memories
        self._devices = devices
        self._shared = shared
        self._past_s = max(0.0, time.time() - state.taken_at)
        self._blocks: list[SharedBlock] = []

    def sessions(self, new_session: Callable[[Any, dict[int, Device]], WorkerSession]) -> list[WorkerSession]:
        state = self._state
        torch.set_num_threads(state.threads)
        for device, content in zip(self._devices, state.generators):
            device.generator.set_state(_state_tensor(content))
        created = [new_session(s.identity, self._numbered(s.devices)) for s in state.sessions]
        for block in state.blocks:
            self._blocks.append(self._block(block, created))
        for session, s in zip(created, state.sessions):
            self._fill(session, s)
        if any(not block.users and not block.senders for block in self._blocks):
            raise ValueError("memory that nobody uses")
        return created

    def others(self, new_other: Callable[[Any, dict[int, Device], str], OtherSession] | None) -> None:
        for s in self._state.others:
            if new_other is None:
                raise ValueError(f"a session of {s.framework:.20}, which is not served here")
            contents = {}
            for array in s.arrays:
                memory = self._memories.get(array.memory)
                if memory is None:
                    raise ValueError(f"memory {array.memory} that was not sent")
                contents[array.id] = memory.bytes.numpy()
            new_other(s.identity, self._numbered(s.devices), s.framework).executes.restore(s.rest, contents)

    def _numbered(self, devices: tuple[tuple[int, int], ...]) -> dict[int, Device]:
        numbered = {number: self._device(k) for number, k in devices}
        if not numbered or len(numbered) != len(devices):
            raise ValueError("a session whose devices have no numbers of their own")
        return numbered

    def _device(self, ordinal: int) -> Device:
        if not 0 <= ordinal < len(self._devices):
            raise ValueError(f"device {ordinal} of {len(self._devices)}")
        return self._devices[ordinal]

    def _tensor(self, memory: int, layout: Layout, device: Device) -> torch.Tensor:
        found = self._memories.get(memory)
        if found is None or self._device(found.device) is not device:
            raise ValueError(f"memory {memory} that was not sent")
        dtype = dtype_named(layout.dtype)
        if (
            len(layout.size) != len(layout.stride)
            or min((*layout.size, *layout.stride, layout.offset), default=0) < 0
        ):
            raise ValueError(f"a layout of {layout}")
        storage = found.bytes.untyped_storage()
        if needed_bytes(layout.size, layout.stride, layout.offset, dtype.itemsize) > storage.nbytes():
            raise ValueError(f"a tensor of {layout} on {storage.nbytes()} bytes")
        blank = torch.empty(0, dtype=dtype, device=found.bytes.device)
        return blank.set_(storage, layout.offset, layout.size, layout.stride)

    def _block(self, block: BlockState, sessions: Sequence[WorkerSession]) -> SharedBlock:
        device = self._device(block.device)
        slot = Slot(self._tensor(block.memory, block.layout, device), device, self._nbytes(block.nbytes))
        device.take(rounded(block.nbytes))
        senders = [object() if k < 0 else sessions[k].sender for k in self._positions(block, len(sessions))]
        return self._shared.put(
            slot, block.name, senders, [s for s, k in zip(senders, block.senders) if k < 0]
        )

    def _positions(self, block: BlockState, many: int) -> tuple[int, ...]:
        if any(not -1 <= k < many for k in block.senders):
            raise ValueError(f"memory sent by {block.senders} of {many} sessions")
        return block.senders

    def _nbytes(self, nbytes: int) -> int:
        if nbytes < 0:
            raise ValueError(f"a storage of {nbytes} bytes")
        return nbytes

    def _fill(self, session: WorkerSession, s: SessionState) -> None:
        now = time.perf_counter()
        for storage in s.storages:
            session.add(storage.id, self._slot(storage))
        session.define_again([(t.id, t.previous, t.definition) for t in s.templates])
        for g in s.graphs:
            session.graphs.define_again(g.id, g.definition, g.calls_left, g.compiled)
        for named in s.generators:
            session.handles.put_generator(named.id, self._device(named.device), _state_tensor(named.state))
        for k, device in enumerate(self._devices):
            ages_s = {event.id: event.age_s + self._past_s for event in s.events if event.device == k}
            if ages_s:
                session.handles.put_events(device, ages_s)
        if s.calls is not None:
            session.trace_again([[name, k, now - self._past_s - age, took] for name, k, age, took in s.calls])

    def _slot(self, s: StorageState) -> Slot:
        device = self._device(s.device)
        if s.memory is None or s.layout is None:
            if not isinstance(s.poison, dict):
                raise ValueError(f"storage {s.id} without memory and without a reason")
            device.take(rounded(self._nbytes(s.nbytes)))
            return Slot(None, device, s.nbytes, s.poison)
        if s.block is None:
            device.take(rounded(self._nbytes(s.nbytes)))
            return Slot(self._tensor(s.memory, s.layout, device), device, s.nbytes)
        if not 0 <= s.block < len(self._blocks):
            raise ValueError(f"storage {s.id} on block {s.block} of {len(self._blocks)}")
        block = self._blocks[s.block]
        if block.device is not device or block.nbytes != s.nbytes:
            raise ValueError(f"storage {s.id} on a block of other memory")
        slot = Slot(self._tensor(s.memory, s.layout, device), device, s.nbytes)
        slot.shared = block
        block.users += 1
        return slot


def _state_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).clone()

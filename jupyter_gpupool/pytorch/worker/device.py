"""What a slice is to its worker, whatever it computes on: its memory, its random state, and the work on it."""

from __future__ import annotations

import abc
import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

from jupyter_gpupool.pytorch.protocol.commands import DEFAULT_SEED
from jupyter_gpupool.pytorch.protocol.sizes import host_bytes, out_of_memory, rounded
from jupyter_gpupool.transport.specs import DeviceSpec

from .accounts import BLOCK_BYTES, Account
from .device_errors import DeviceFailure
from .recordings import Recordings


class Event(Protocol):
    """A moment in the work of a device, as ``torch.cuda.Event`` is one."""

    def query(self) -> bool:
        """Whether everything before it has run."""

    def synchronize(self) -> None:
        """Wait until everything before it has run."""

    def elapsed_time(self, end: Any) -> float:
        """The milliseconds from this moment to another one of the same device."""


class HostCopy:
    """The elements of a tensor, in order, on their way to the host.

    ``arriving`` yields how many bytes are there, more each time until all are.
    """

    def __init__(self, buffer: torch.Tensor, arriving: Iterable[int]) -> None:
        #: where the elements arrive; all of them are there once every piece was asked for. It keeps the memory: an
        #: answer may be sent again after this object, and the tensor that was read, are gone.
        self.view: memoryview = host_bytes(buffer.detach())
        self.nbytes = self.view.nbytes
        self._arriving = iter(arriving)
        self._first: list[int] = []

    def start(self) -> None:
        """Begin, and return once the first piece is there: what failed on the device before is raised here."""
        self._first = list(itertools.islice(self._arriving, 1))

    def pieces(self) -> Iterator[memoryview]:
        """The parts of the view, each as soon as it is there."""
        start = 0
        for end in itertools.chain(self._first, self._arriving):
            yield self.view[start:end]
            start = end

    def wait(self) -> memoryview:
        """The whole view, once all of it is there."""
        for _ in self._arriving:
            pass
        return self.view


class OutOfSliceMemory(torch.OutOfMemoryError):
    """An allocation of ``wanted`` bytes that does not fit into a slice beside what is ``allocated``."""

    def __init__(self, device: Device, wanted: int, allocated: int) -> None:
        self.device = device
        self._sizes = wanted, allocated, device.spec.limit_mib << 20
        super().__init__(self.message(device.spec.index))

    def message(self, number: int) -> str:
        """The message for a client that calls the slice ``number``."""
        return out_of_memory(number, *self._sizes, overhead=self.device.overhead)


class Device(abc.ABC):
    """One slice of the worker. Its memory, in bytes, is counted for all sessions together.

    Subclasses have what differs between emulated and real GPUs; nothing else in the worker asks which one it is.
    """

    #: whether graphs are compiled by inductor where their program has not chosen
    compiles_graphs = False
    #: whether it has memory of a GPU, which other processes get after it
    clears_memory = False

    def __init__(self, spec: DeviceSpec, torch_device: torch.device) -> None:
        self.spec = spec
        self.torch_device = torch_device
        #: what the slice's memory has to hold beside tensors: the context, workspaces of libraries
        self.overhead = 0
        #: what tensors may take
        self.limit = spec.limit_mib << 20
        #: the bytes that are taken, and those that sessions have in advance
        self._granted = 0
        #: one for each session that uses it
        self._accounts: list[Account] = []
        #: the time in calls of operators, on the host
        self.busy_s = 0.0
        self._busy_before_s = 0.0
        #: the share of the last second or so in which it computed, 0 to 1
        self.busy = 0.0
        self.lock = threading.Lock()
        #: what it has recorded of graphs; nothing where subclasses do not record
        self.recordings = Recordings(self)
        #: frees what nobody needs; returns whether there was any
        self.reclaim: Callable[[], bool] = lambda: False
        #: what operators draw from that are given no generator
        self.generator = self._default_generator().manual_seed(DEFAULT_SEED)

    def _default_generator(self) -> torch.Generator:
        return torch.Generator(self.torch_device)

    @staticmethod
    @abc.abstractmethod
    def prepare_process(specs: Sequence[DeviceSpec]) -> None:
        """Set up this process for devices of this kind, before a thread is started and before CUDA is used."""

    # -- memory

    def resize(self, spec: DeviceSpec) -> None:
        """Take over a new limit. The caller holds the lock, and has checked that what is allocated fits."""
        self.spec = spec
        self.limit = max(0, (spec.limit_mib << 20) - self.overhead)

    def used(self) -> int:
        """The bytes of the slice that are not free."""
        return self.taken() + self.overhead

    def taken(self) -> int:
        """The bytes that tensors take, and what is kept for them."""
        with self.lock:
            return self.allocated

    @property
    def in_use(self) -> int:
        """As :meth:`used`, for a caller that holds the lock."""
        return self.allocated + self.overhead

    @property
    def is_shared(self) -> bool:
        """Whether more than one session uses it."""
        return len(self._accounts) > 1

    @property
    def allocated(self) -> int:
        """As :meth:`taken`, for a caller that holds the lock.

        Without it, it is wrong by as much as a session has in advance while one gets more of that or ends, and it may
        be negative.
        """
        return self._granted - sum([account.left for account in self._accounts])

    def take(self, nbytes: int) -> None:
        """Account for an allocation. Raises OutOfSliceMemory if it does not fit."""
        with self.lock:
            if self._has(nbytes):
                self._granted += nbytes
                return
        self._make_room()
        with self.lock:
            if not self._has(nbytes):
                raise OutOfSliceMemory(self, nbytes, self._granted)
            self._granted += nbytes

    def refill(self, account: Account, nbytes: int) -> None:
        """Account for an allocation, and let the account have more in advance. Raises OutOfSliceMemory."""
        with self.lock:
            block = min(self.limit - self._granted, max(nbytes, BLOCK_BYTES))
            if block >= nbytes and not account.closed:
                self._granted += block
                account.left += block - nbytes
                return
        self.take(nbytes)

    def _has(self, nbytes: int) -> bool:
        """Whether so many bytes are free, if need be after what sessions have in advance is called in."""
        if self._granted + nbytes > self.limit:
            self._call_in()
        return self._granted + nbytes <= self.limit

    def _call_in(self) -> None:
        for account in self._accounts:
            self._granted -= account.call_in()

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Let nothing be taken meanwhile."""
        with self.lock:
            self._call_in()
            yield

    def _make_room(self) -> None:
        """Free what nobody needs, or what only makes something faster."""
        self.reclaim()
        self.recordings.forget()

    def join(self) -> Account:
        """A session begins to use it, with this account. It may use the device's own methods besides."""
        account = Account(self)
        with self.lock:
            self._accounts.append(account)
        return account

    def leave(self, account: Account) -> None:
        """The session of an account has ended."""
        with self.lock:
            self._accounts.remove(account)
            self._granted -= account.call_in()

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[bool]:
        """Let no other session begin meanwhile, and the memory not be resized; whether there is one session only."""
        with self.lock:
            yield len(self._accounts) == 1

    def call_again(
        self, error: torch.OutOfMemoryError, function: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Free what can be freed, and repeat a call that ran out of memory.

        ``function`` is None for a call that must not be repeated, because it may have changed something.
        Raises torch.OutOfMemoryError.
        """
        raise error

    def give(self, nbytes: int) -> None:
        """Account for freed memory."""
        with self.lock:
            self._granted -= nbytes

    def give_storage(self, nbytes: int) -> None:
        """Account for a freed storage of ``nbytes`` bytes."""
        self.give(rounded(nbytes))

    @abc.abstractmethod
    def can_become(self, spec: DeviceSpec) -> bool:
        """Whether this process could go on with another slice of this kind, while its memory is parked."""

    def clear_memory(self, only_unused: bool = False) -> None:  # noqa: B027  where memory is the process's own
        """Zero what it holds of the GPU, before others can have that. No session may use it meanwhile.

        ``only_unused``: leave what tensors are on.
        """

    @abc.abstractmethod
    def release_memory(self) -> None:
        """Give the GPU what no tensor uses, so that others can have it."""

    # -- copies

    @abc.abstractmethod
    def upload(self, target: torch.Tensor, receive: Callable[[memoryview], None]) -> None:
        """Fill a tensor with what ``receive`` writes: the elements in order, into one buffer after the other.

        Every byte is received, even where the copy fails.
        """

    @abc.abstractmethod
    def download(self, source: torch.Tensor) -> HostCopy:
        """Start to copy a tensor to the host."""

    @abc.abstractmethod
    def copy_to_host(self, source: torch.Tensor, target: memoryview) -> None:
        """Write the elements of a tensor into a buffer of their size, and return when they are there."""

    @abc.abstractmethod
    def copy_from_host(self, target: torch.Tensor, source: memoryview) -> None:
        """Fill a tensor from a buffer of its size. The buffer may be changed afterwards."""

    def in_place(self, memory: torch.Tensor) -> memoryview | None:
        """The bytes of a piece of its memory where the host can read and write them in place; None where it cannot."""
        return None

    # -- work

    def submitted(self, began: float) -> None:  # noqa: B027  where calls return when their work is done
        """Note that what was called since ``began``, by time.perf_counter, has been submitted."""

    def measure_busy(self, elapsed_s: float) -> float:
        """Set and return ``busy``: the share of the ``elapsed_s`` seconds since the last call in which it computed.

        Rounded up to hundredths: a lease that computed at all is not idle.
        """
        now_s = self._busy_seconds()
        share = min(1.0, max(0.0, now_s - self._busy_before_s) / max(elapsed_s, 1e-9))
        self._busy_before_s = now_s
        self.busy = math.ceil(share * 100) / 100
        return self.busy

    def _busy_seconds(self) -> float:
        return self.busy_s

    def failure(self, error: BaseException) -> DeviceFailure | None:
        """Why this process cannot use the device any more; None if ``error`` is one of an operator alone."""
        return None

    @abc.abstractmethod
    def kernel(self, op: Any, default: Any) -> Any:
        """What runs the operator ``op`` here: a function of its arguments. ``default``: what does so elsewhere."""

    @abc.abstractmethod
    def match_threads(self, count: int) -> None:
        """Round as a client's CPU does that uses so many threads, if a CPU computes here too."""

    @abc.abstractmethod
    def is_idle(self) -> bool:
        """Whether everything that was started has run."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait until everything that was started has run."""

    @abc.abstractmethod
    def record_event(self) -> Event:
        """This moment in the device's work."""

    @abc.abstractmethod
    def past_events(self, ages_s: Sequence[float]) -> Sequence[Event]:
        """Moments that many seconds ago, when another device may have done the work."""

    @abc.abstractmethod
    def ages_s(self, events: Sequence[Any]) -> list[float]:
        """The seconds from each of its events to one moment now. The caller has synchronized the device."""

    @abc.abstractmethod
    def properties(self) -> dict[str, int]:
        """The numbers of ``torch.cuda.get_device_properties``. Raises ValueError where there are none."""

    @abc.abstractmethod
    def readings(self) -> dict[str, int]:
        """What its sensors report now, by the names of torch.cuda's functions."""

"""A real GPU, through PyTorch's CUDA. This file and cuda_graphs.py are the only ones of the worker that name it."""

from __future__ import annotations

import gc
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol.device_properties import NUMBERS
from jupyter_gpupool.pytorch.protocol.sizes import CONTEXT_BYTES, host_bytes, rounded
from jupyter_gpupool.transport.specs import DeviceSpec

from . import clearing
from .busy_clock import BusyClock
from .cuda_graphs import CudaRecorder, can_record, free_cache
from .device import Device, HostCopy, OutOfSliceMemory
from .device_errors import DeviceFailure, device_failure
from .process_on_gpu import ProcessOnGpu
from .recordings import Recordings
from .staging import Staging, discard

log = logging.getLogger(__name__)

_READINGS = ("utilization", "memory_usage", "temperature", "power_draw", "clock_rate")

#: Copies go through page-locked memory in pieces of so many bytes, so many of them at once.
_PIECE_BYTES = 8 << 20
_MAX_PIECES = 4
#: A copy of up to so many bytes is not worth a stream of its own.
_SMALL_BYTES = 64 << 10
#: A copy to the host of up to so many bytes goes into page-locked memory as a whole. PyTorch keeps such memory for
#: the next one.
_MAX_PINNED_BYTES = 512 << 20
#: While operators run, an upload of up to so many bytes goes to memory of its own first, and does not wait for them.
_MAX_BESIDE_BYTES = 512 << 20
#: More than a context and libraries take; a larger growth of a GPU's use is that of other processes.
_MAX_OVERHEAD_BYTES = 2 << 30

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class CudaDevice(Device):
    """A slice of a real GPU. ``ordinal`` is its number among the GPUs that this process sees.

    Everything runs on the default stream but copies, which have one of their own.
    """

    compiles_graphs = True
    clears_memory = True

    def __init__(self, spec: DeviceSpec, ordinal: int) -> None:
        self._process = ProcessOnGpu(spec.uuid)
        self._ordinal = ordinal
        super().__init__(spec, self._torch_device(ordinal))
        self._copies = torch.cuda.Stream(self.torch_device)
        self._noted_host_s = 0.0
        self._staging = Staging(_pinned, self._push, _PIECE_BYTES, _MAX_PIECES)
        self._warm_up()
        self._clock = BusyClock(self._record, time.perf_counter)
        #: what the libraries hold of the allocator's memory; there is no tensor yet
        self._workspaces = torch.cuda.memory_allocated(self.torch_device)
        #: what this process uses outside of the allocator: the context, and loaded kernels
        self._context = self._context_bytes()
        if can_record():
            self.recordings = Recordings(self, CudaRecorder(self.torch_device, self.failure))
        self.resize(spec)

    @staticmethod
    def _torch_device(ordinal: int) -> torch.device:
        return torch.device("cuda", ordinal)

    def _default_generator(self) -> torch.Generator:
        torch.cuda.init()  # before, there are none
        generator: torch.Generator = torch.cuda.default_generators[self._ordinal]
        return generator

    @staticmethod
    def prepare_process(specs: Sequence[DeviceSpec]) -> None:
        # PyTorch then counts the slices from 0, as the lease does.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(d.uuid for d in specs)

    # -- memory

    def _warm_up(self) -> None:
        """Let the libraries load what nearly every program needs, so that it is measured."""
        with torch.inference_mode():
            for dtype in (torch.float32, torch.float16):
                x = torch.ones(1, 8, 8, 8, dtype=dtype, device=self.torch_device)
                torch.nn.functional.conv2d(x, x.expand(8, 8, 8, 8).contiguous(), padding=1)
                (x[0, 0] @ x[0, 0]).sum().item()
        torch.cuda.synchronize(self.torch_device)
        free_cache()

    def _context_bytes(self) -> int:
        """What this process uses on the GPU outside of PyTorch's allocator."""
        reserved = torch.cuda.memory_reserved(self.torch_device)
        used = self._process.used_bytes()
        if used is not None:
            return max(0, used - reserved)
        grown = self._process.growth_bytes()
        if grown is not None and reserved < grown <= _MAX_OVERHEAD_BYTES + reserved:
            return grown - reserved
        return CONTEXT_BYTES

    def resize(self, spec: DeviceSpec) -> None:
        self.overhead = -(-(self._context + self._workspaces) >> 20) << 20
        super().resize(spec)
        # The allocator may reserve what the context leaves, its own workspaces and rounding included.
        free_cache()
        total = torch.cuda.mem_get_info(self.torch_device)[1]
        share = max(0, (spec.limit_mib << 20) - self._context) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), self.torch_device)

    def call_again(
        self, error: torch.OutOfMemoryError, function: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        if function is None:
            raise self._explained(error)
        # The allocator has given back what it had cached, and failed again. What is left is what others hold.
        self._make_room()
        gc.collect()
        torch.cuda.synchronize(self.torch_device)
        free_cache()
        try:
            return function(*args, **kwargs)
        except torch.OutOfMemoryError as e:
            raise self._explained(e) from None

    def _explained(self, error: torch.OutOfMemoryError) -> torch.OutOfMemoryError:
        # PyTorch's own message describes the whole GPU, and what others use of it.
        found = re.search(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", str(error))
        if found is None or "gpupool" in str(error):
            return error
        wanted = int(float(found[1]) * _UNITS[found[2]])
        cached = torch.cuda.memory_reserved(self.torch_device) - self._workspaces
        return OutOfSliceMemory(self, wanted, max(self.allocated, cached))

    # -- copies

    def can_become(self, spec: DeviceSpec) -> bool:
        return spec.uuid == self.spec.uuid  # CUDA chooses its GPUs once for each process

    def clear_memory(self, only_unused: bool = False) -> None:
        self.recordings.forget()
        torch.cuda.synchronize(self.torch_device)
        with torch.inference_mode():
            # With the next allocation, the allocator takes back what waited for other streams.
            torch.empty(1, dtype=torch.uint8, device=self.torch_device)
            held = clearing.pieces(torch.cuda.memory_snapshot(), self.torch_device.index, only_unused)
            clearing.zero(held, self.torch_device)
        torch.cuda.synchronize(self.torch_device)

    def release_memory(self) -> None:
        self.recordings.forget()
        torch.cuda.synchronize(self.torch_device)
        free_cache()

    def upload(self, target: torch.Tensor, receive: Callable[[memoryview], None]) -> None:
        nbytes = target.numel() * target.itemsize
        if nbytes <= _SMALL_BYTES:
            staging = torch.empty(target.shape, dtype=target.dtype)
            receive(host_bytes(staging))
            target.copy_(staging)
            return
        try:
            room = self._room_for(target)
        except Exception:
            discard(receive, nbytes)
            raise
        compute = self._compute()
        try:
            self._staging.upload(_as_bytes(room), receive)
        finally:  # also where the connection breaks: pieces are on their way
            compute.wait_stream(self._copies)
        if room is not target:
            target.copy_(room)
            room.record_stream(compute)

    def _room_for(self, target: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor that the copy stream may fill now: the target itself, or one to copy from later.

        The target's memory may be that of a freed tensor which operators still use. So the copy would wait for them,
        unless it goes elsewhere first.
        """
        compute = self._compute()
        nbytes = target.numel() * target.itemsize
        working = not compute.query()
        if working and nbytes <= _MAX_BESIDE_BYTES and self.allocated + rounded(nbytes) <= self.limit:
            try:
                with torch.cuda.stream(self._copies):
                    return torch.empty(target.shape, dtype=target.dtype, device=self.torch_device)
            except torch.OutOfMemoryError:
                pass  # then it waits
        room = target
        if not target.is_contiguous():
            room = torch.empty(target.shape, dtype=target.dtype, device=self.torch_device)
        if working or room is not target:
            self._copies.wait_stream(compute)
        return room

    def download(self, source: torch.Tensor) -> HostCopy:
        nbytes = source.numel() * source.itemsize
        if nbytes <= _SMALL_BYTES:
            return HostCopy(source.contiguous().cpu(), [nbytes])
        pinned = nbytes <= _MAX_PINNED_BYTES
        buffer = _pinned(nbytes) if pinned else torch.empty(nbytes, dtype=torch.uint8)
        return HostCopy(buffer, self._arriving(source, buffer, pinned))

    def _arriving(self, source: torch.Tensor, target: torch.Tensor, pinned: bool) -> Iterator[int]:
        kept = source.contiguous()
        compute = self._compute()
        self._copies.wait_stream(compute)
        yield from self._staging.download(_as_bytes(kept), target, pinned)
        # All of it has arrived, so that whatever overwrites or frees the source need not wait.

    def copy_to_host(self, source: torch.Tensor, target: memoryview) -> None:
        if source.numel():
            buffer = torch.frombuffer(target, dtype=torch.uint8)
            for _ in self._arriving(source, buffer, buffer.is_pinned()):
                pass

    def copy_from_host(self, target: torch.Tensor, source: memoryview) -> None:
        left = source

        def receive(view: memoryview) -> None:
            nonlocal left
            torch.frombuffer(view, dtype=torch.uint8).copy_(
                torch.frombuffer(left[: len(view)], dtype=torch.uint8)
            )
            left = left[len(view) :]

        if target.numel():
            self.upload(target, receive)

    def _push(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._copies)
        return event

    # -- work

    def kernel(self, op: Any, default: Any) -> Any:
        return default

    def match_threads(self, count: int) -> None:
        pass

    def _compute(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.torch_device)

    def is_idle(self) -> bool:
        return self._compute().query()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def record_event(self) -> _CudaMoment:
        return _CudaMoment(self._record())

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._compute())
        return event

    def past_events(self, ages_s: Sequence[float]) -> list[_CudaMoment]:
        reference = self._record()
        reference.synchronize()
        return [_CudaMoment(reference, age_s) for age_s in ages_s]

    def ages_s(self, events: Sequence[_CudaMoment]) -> list[float]:
        now = _CudaMoment(self._record())
        now.synchronize()
        return [event.elapsed_time(now) / 1e3 for event in events]

    def submitted(self, began: float) -> None:
        if self.busy_s != self._noted_host_s:  # something was called here
            self._noted_host_s = self.busy_s
            self._clock.submitted(began)

    def _busy_seconds(self) -> float:
        return self._clock.seconds()

    def measure_busy(self, elapsed_s: float) -> float:
        # NVML counts kernels that nobody submits through a session, too: those of a compiler that measures.
        share = max(super().measure_busy(elapsed_s), self._process.utilization() or 0.0)
        self.busy = min(1.0, share)
        return self.busy

    def failure(self, error: BaseException) -> DeviceFailure | None:
        found = device_failure(error)
        if found is None and isinstance(error, RuntimeError) and _OF_A_LIBRARY.search(str(error)):
            try:  # a library names its own error, and CUDA repeats the one behind it
                torch.cuda.synchronize(self.torch_device)
            except Exception as e:
                found = device_failure(e)
        return found

    def properties(self) -> dict[str, int]:
        found = torch.cuda.get_device_properties(self.torch_device)
        facts = ((name, getattr(found, name, None)) for name in NUMBERS)
        return {name: fact for name, fact in facts if isinstance(fact, int)}

    def readings(self) -> dict[str, int]:
        found = {}
        for name in _READINGS:
            try:
                found[name] = int(getattr(torch.cuda, name)(self.torch_device))
            except Exception as e:  # NVML has an exception for each reason; the driver's log has the others
                log.debug("%s of %s: %s", name, self.spec.name, e)
        return found


class _CudaMoment:
    """A recorded event, or a moment some seconds before one: of work that another process has done."""

    def __init__(self, event: torch.cuda.Event, before_s: float = 0.0) -> None:
        self.event = event
        self.before_s = before_s

    def query(self) -> bool:
        done: bool = self.event.query()
        return done

    def synchronize(self) -> None:
        self.event.synchronize()

    def elapsed_time(self, end: _CudaMoment) -> float:
        between: float = self.event.elapsed_time(end.event)
        return between + (self.before_s - end.before_s) * 1e3


_OF_A_LIBRARY = re.compile("CUDA|cuDNN|CUDNN|CUBLAS|CUFFT|CUSOLVER|CUSPARSE")


def _pinned(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _as_bytes(t: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor of any dtype, as a tensor on the same memory."""
    start = t.storage_offset() * t.itemsize
    blank = torch.empty(0, dtype=torch.uint8, device=t.device)
    bytes_of: torch.Tensor = blank.set_(t.untyped_storage(), start, (t.numel() * t.itemsize,), (1,))
    return bytes_of

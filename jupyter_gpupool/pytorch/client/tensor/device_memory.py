"""What this process has allocated on the slices of its lease."""

from __future__ import annotations

import threading

import torch

from jupyter_gpupool.pytorch.protocol.sizes import out_of_memory
from jupyter_gpupool.transport.specs import DeviceSpec


class DeviceMemory:
    """What this process has allocated on one slice, in bytes.

    A destructor may run in the middle of anything, this class's own methods included. So it only appends to
    ``freed``, and the next call subtracts what is there.
    """

    def __init__(self, spec: DeviceSpec, overhead: int = 0) -> None:
        self.index = spec.index
        self.whole = spec.limit_mib << 20
        #: what of the slice is not for tensors: CUDA's context, workspaces of libraries
        self.overhead = overhead
        #: the fraction of the slice that the program limits itself to
        self.fraction = 1.0
        self.limit = self._limit()
        self.freed: list[int] = []
        self.allocated_total = 0
        self.peak = 0
        #: the number of allocations now, and its maximum
        self.count = self.peak_count = 0
        #: bytes and allocations freed, and allocations refused, since the totals were last reset
        self.freed_total = self.freed_count = self.refused = 0
        #: what was allocated when the totals were last reset
        self.base_bytes = self.base_count = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> None:
        """Account for one allocation. Raises torch.OutOfMemoryError and changes nothing if it does not fit."""
        with self._lock:
            used = self._settle()
            if used + nbytes > self.limit:
                self.refused += 1
                raise self._refusal(nbytes, used)
            self.allocated_total = used = used + nbytes
            self.count = count = self.count + 1
            if used > self.peak:
                self.peak = used
            if count > self.peak_count:
                self.peak_count = count

    def expect(self, nbytes: int) -> None:
        """Raise torch.OutOfMemoryError if ``nbytes`` more cannot be allocated now."""
        with self._lock:
            used = self._settle()
            if used + nbytes > self.limit:
                self.refused += 1
                raise self._refusal(nbytes, used)
            self.peak = max(self.peak, used + nbytes)

    def _refusal(self, nbytes: int, used: int) -> torch.OutOfMemoryError:
        allowed = self.limit if self.limit < self.whole - self.overhead else None
        return torch.OutOfMemoryError(
            out_of_memory(self.index, nbytes, used, self.whole, allowed, self.overhead)
        )

    def note(self, nbytes: int) -> None:
        """Account for an allocation that the worker has made already."""
        with self._lock:
            self.allocated_total = self._settle() + nbytes
            self.peak = max(self.peak, self.allocated_total)
            self.count += 1
            self.peak_count = max(self.peak_count, self.count)

    def resize(self, limit: int) -> None:
        """Set the size of the slice to ``limit`` bytes. A fraction that the program limits itself to is kept."""
        with self._lock:
            self.whole = limit
            self.limit = self._limit()

    def limit_to(self, fraction: float) -> None:
        """Let this process allocate no more than a fraction (0 to 1) of the slice."""
        with self._lock:
            self.fraction = fraction
            self.limit = self._limit()

    def _limit(self) -> int:
        return max(0, min(int(self.whole * self.fraction), self.whole - self.overhead))

    def reset_peak(self) -> None:
        """Start the peaks again from what is allocated now."""
        with self._lock:
            self.peak, self.peak_count = self._settle(), self.count

    def reset_totals(self) -> None:
        """Start the totals again from what is allocated now."""
        with self._lock:
            self.base_bytes, self.base_count = self._settle(), self.count
            self.freed_total = self.freed_count = self.refused = 0

    def allocated(self) -> int:
        """Bytes that are allocated now."""
        with self._lock:
            return self._settle()

    def _settle(self) -> int:
        freed = self.freed
        if freed:
            n = len(freed)
            nbytes = sum(freed[:n])
            del freed[:n]
            self.allocated_total -= nbytes
            self.freed_total += nbytes
            self.count -= n
            self.freed_count += n
        return self.allocated_total

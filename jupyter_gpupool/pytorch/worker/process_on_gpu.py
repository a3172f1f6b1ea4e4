"""What NVML, the driver's management library, reports about this process on one GPU."""

from __future__ import annotations

import logging
import os
from typing import Any

import pynvml

log = logging.getLogger(__name__)


class ProcessOnGpu:
    """This process on the GPU of that uuid. Every answer is None where the driver has none.

    In a container, a process does not know the number by which the driver knows it. So create this before CUDA is
    first used: the process that appears on the GPU afterwards is this one.
    """

    def __init__(self, uuid: str) -> None:
        self._pid: int | None = None
        self._seen_us = 0
        self._handle: Any = None
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except (pynvml.NVMLError, TypeError, AttributeError) as e:
            log.debug("NVML does not find %s: %s", uuid, e)
        self._before = set(self._memory_by_pid())
        self._used_before = self.device_used_bytes()

    def device_used_bytes(self) -> int | None:
        """The bytes in use on the GPU, by whatever process."""
        info = self._ask("nvmlDeviceGetMemoryInfo")
        return None if info is None else int(info.used)

    def used_bytes(self) -> int | None:
        """The bytes that this process uses on the GPU, everything included."""
        memory = self._memory_by_pid()
        pid = self._own(memory)
        if pid is not None:
            return memory[pid]
        return None

    def growth_bytes(self) -> int | None:
        """By how many bytes the use of the whole GPU has grown: others may have had a part in it."""
        now = self.device_used_bytes()
        return None if now is None or self._used_before is None else max(0, now - self._used_before)

    def utilization(self) -> float | None:
        """The share (0 to 1) of the time since the last call in which a kernel of this process ran, as sampled."""
        pid = self._own(self._memory_by_pid())
        if pid is None:
            return None
        samples = self._ask("nvmlDeviceGetProcessUtilization", self._seen_us) or []
        self._seen_us = max([self._seen_us, *(s.timeStamp for s in samples)])
        own = [s.smUtil for s in samples if s.pid == pid]
        return sum(own) / len(own) / 100 if own else None

    def _own(self, memory: dict[int, int]) -> int | None:
        if self._pid is None:
            new = set(memory) - self._before
            if os.getpid() in memory:
                self._pid = os.getpid()
            elif len(new) == 1:
                self._pid = new.pop()
        return self._pid if self._pid in memory else None

    def _memory_by_pid(self) -> dict[int, int]:
        found = self._ask("nvmlDeviceGetComputeRunningProcesses") or []
        return {p.pid: int(p.usedGpuMemory) for p in found if p.usedGpuMemory is not None}

    def _ask(self, name: str, *args: Any) -> Any:
        if self._handle is None:
            return None
        try:
            return getattr(pynvml, name)(self._handle, *args)
        except (pynvml.NVMLError, AttributeError) as e:
            log.debug("%s: %s", name, e)
            return None

"""Read the health of this machine's GPUs with NVML."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pynvml

from jupyter_gpupool.core.readings import GPUReading
from jupyter_gpupool.gpus.nvml import ask, in_mig_mode, memory_of, mig_instances, text

log = logging.getLogger(__name__)

#: Bits of the clock event reasons that mean reduced clocks, with their meanings.
_THROTTLING = (
    (0x0000000000000004, "power cap"),
    (0x0000000000000008, "hardware slowdown"),
    (0x0000000000000020, "temperature"),
    (0x0000000000000040, "hardware, temperature"),
    (0x0000000000000080, "power brake"),
)
#: How many of a GPU's last errors are kept.
_MAX_KEPT_ERRORS = 16


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver. ``missing``: why NVML is not usable; ``installed``: whether a driver is there all the same."""

    version: str | None = None
    cuda: str | None = None
    missing: str = ""
    installed: bool = False


def read(
    xids: Mapping[str, Sequence[tuple[int, float]]] | None = None,
) -> tuple[Driver, tuple[GPUReading, ...]]:
    """Read the driver and each device that answers. ``xids``: the errors that :class:`Errors` received, by uuid."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        absent = getattr(error, "value", None) in (
            pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
            pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        )
        return Driver(missing="no NVIDIA driver here" if absent else str(error), installed=not absent), ()
    try:
        cuda = ask(pynvml.nvmlSystemGetCudaDriverVersion)
        driver = Driver(
            text(ask(pynvml.nvmlSystemGetDriverVersion)) or None,
            None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            installed=True,
        )
        found = []
        for index in range(ask(pynvml.nvmlDeviceGetCount) or 0):
            handle = ask(pynvml.nvmlDeviceGetHandleByIndex, index)
            uuid = "" if handle is None else text(ask(pynvml.nvmlDeviceGetUUID, handle))
            if uuid:
                found.append(_gpu(handle, uuid, index, (xids or {}).get(uuid, ())))
        return driver, tuple(found)
    finally:
        ask(pynvml.nvmlShutdown)


def _gpu(handle: Any, uuid: str, index: int, xids: Sequence[tuple[int, float]]) -> GPUReading:
    covers = [uuid]
    if in_mig_mode(handle):
        covers = [text(ask(pynvml.nvmlDeviceGetUUID, instance)) for instance in mig_instances(handle)]
    memory = memory_of(handle)
    rows = ask(pynvml.nvmlDeviceGetRemappedRows, handle)  # (corrected, uncorrected, pending, failed)
    pending = None if rows is None else bool(rows[2])
    if pending is None:  # before Ampere, pages were retired instead
        retired = ask(pynvml.nvmlDeviceGetRetiredPagesPendingStatus, handle)
        pending = None if retired is None else bool(retired)
    return GPUReading(
        uuid=uuid,
        index=index,
        name=text(ask(pynvml.nvmlDeviceGetName, handle)) or "NVIDIA GPU",
        covers=tuple(name for name in covers if name),
        memory_mib=memory[1] if memory is not None and memory[1] > 0 else None,
        uncorrected=_errors(handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC),
        uncorrected_ever=_errors(
            handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_AGGREGATE_ECC
        ),
        corrected=_errors(handle, pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, pynvml.NVML_VOLATILE_ECC),
        remapping_failed=None if rows is None else bool(rows[3]),
        needs_reset=pending,
        temperature_c=ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        slowdown_c=ask(
            pynvml.nvmlDeviceGetTemperatureThreshold, handle, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        ),
        throttled=_throttled(handle),
        xids=tuple((int(number), float(at)) for number, at in xids),
    )


def _errors(handle: Any, kind: int, counter: int) -> int | None:
    count: int | None = ask(pynvml.nvmlDeviceGetTotalEccErrors, handle, kind, counter)
    return count


def _throttled(handle: Any) -> tuple[str, ...] | None:
    reasons = getattr(  # by its older name in bindings of before CUDA 12.2
        pynvml,
        "nvmlDeviceGetCurrentClocksEventReasons",
        getattr(pynvml, "nvmlDeviceGetCurrentClocksThrottleReasons", None),
    )
    mask = None if reasons is None else ask(reasons, handle)
    return None if mask is None else tuple(meaning for bit, meaning in _THROTTLING if mask & bit)


class Errors:
    """Receives the errors (XIDs) that the driver reports for this machine's GPUs. For use by one thread."""

    def __init__(self) -> None:
        #: By uuid: (number, time in seconds since the epoch), the latest last.
        self.seen: dict[str, list[tuple[int, float]]] = {}
        self._set: Any = None
        self._handles: list[tuple[Any, str]] = []

    def open(self) -> bool:
        """Start listening; return whether any device reports errors."""
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return False
        events = ask(pynvml.nvmlEventSetCreate)
        for index in range(ask(pynvml.nvmlDeviceGetCount) or 0):
            handle = ask(pynvml.nvmlDeviceGetHandleByIndex, index)
            if events is None or handle is None:
                continue
            kinds = (
                ask(pynvml.nvmlDeviceGetSupportedEventTypes, handle) or 0
            ) & pynvml.nvmlEventTypeXidCriticalError
            if not kinds:
                continue
            try:
                pynvml.nvmlDeviceRegisterEvents(handle, kinds, events)
            except pynvml.NVMLError as error:
                log.debug("GPU %d reports no errors: %s", index, error)
                continue
            self._handles.append((handle, text(ask(pynvml.nvmlDeviceGetUUID, handle))))
        if not self._handles:
            if events is not None:
                ask(pynvml.nvmlEventSetFree, events)
            ask(pynvml.nvmlShutdown)
            return False
        self._set = events
        return True

    def wait(self, seconds: float) -> bool:
        """Wait up to ``seconds`` for an error; return whether one came. Raises NVMLError if none can come any more."""
        try:
            event = pynvml.nvmlEventSetWait_v2(self._set, max(1, int(seconds * 1000)))
        except pynvml.NVMLError as error:
            if getattr(error, "value", None) == pynvml.NVML_ERROR_TIMEOUT:
                return False
            raise
        uuid = next((uuid for handle, uuid in self._handles if _same(handle, event.device)), "")
        seen = self.seen.setdefault(uuid, [])
        seen.append((int(event.eventData), time.time()))
        del seen[:-_MAX_KEPT_ERRORS]
        log.warning("The NVIDIA driver reports error (XID) %d of GPU %s", event.eventData, uuid or "unknown")
        return True

    def close(self) -> None:
        """Stop listening."""
        if self._set is not None:
            ask(pynvml.nvmlEventSetFree, self._set)
            self._set = None
            ask(pynvml.nvmlShutdown)


def _same(one: Any, other: Any) -> bool:
    """Return whether two NVML handles are of the same device; the binding compares them by object."""
    import ctypes

    try:
        return ctypes.cast(one, ctypes.c_void_p).value == ctypes.cast(other, ctypes.c_void_p).value
    except (ctypes.ArgumentError, TypeError):
        return one is other

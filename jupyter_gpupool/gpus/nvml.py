"""Real GPUs, as NVIDIA's management library (NVML) reports them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pynvml

from jupyter_gpupool.core.models import GPU, MIB

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceSample:
    """One device's load and memory now; None if the device does not report it (a MIG instance: its load)."""

    uuid: str
    busy: float | None
    used_mib: int | None
    total_mib: int | None


def nvml_gpus(server: str) -> tuple[GPU, ...]:
    """Return the GPUs of this machine; an empty tuple if there is no NVIDIA driver.

    ``index`` is NVML's own, the one that ``nvidia-smi`` shows. A GPU in MIG mode is not listed
    itself; its instances are, each with a uuid ``MIG-...`` and an index after the last whole GPU,
    because an instance is what a process can use. A device without memory of its own (it shares the
    machine's) cannot be divided: it is left out, with a warning.
    """
    found: list[GPU] = []
    with library() as working:
        if not working:
            return ()
        count = pynvml.nvmlDeviceGetCount()
        extra = count
        for index in range(count):
            handle = ask(pynvml.nvmlDeviceGetHandleByIndex, index)
            if handle is None:
                log.warning("GPU %d does not answer; it is left out of the pool", index)
                continue
            if not in_mig_mode(handle):
                gpu = _describe(handle, server, index)
                found += [gpu] if gpu else []
                continue
            for instance in mig_instances(handle):
                gpu = _describe(instance, server, extra)
                found += [gpu] if gpu else []
                extra += 1
    return tuple(found)


def samples() -> tuple[DeviceSample, ...]:
    """Return load and memory of each device now, MIG instances included; empty without a driver."""
    found: list[DeviceSample] = []
    with library() as working:
        if not working:
            return ()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = ask(pynvml.nvmlDeviceGetHandleByIndex, index)
            if handle is None:
                continue
            for device in mig_instances(handle) if in_mig_mode(handle) else [handle]:
                sample = _sample(device)
                found += [sample] if sample else []
    return tuple(found)


@contextmanager
def library() -> Iterator[bool]:
    """Initialize NVML for this block; yield False if it is missing or does not work."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        # The common case is a machine without a GPU, for which emulation exists; so this is no warning.
        log.debug("NVML is not usable here: %s", error)
        yield False
        return
    try:
        yield True
    finally:
        ask(pynvml.nvmlShutdown)


def ask(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the function's result; None if the device or its driver has none."""
    try:
        return function(*args, **kwargs)
    except pynvml.NVMLError as error:
        log.debug("%s: %s", getattr(function, "__name__", function), error)
        return None


def in_mig_mode(handle: Any) -> bool:
    """Return whether the device is in MIG mode."""
    mode = ask(pynvml.nvmlDeviceGetMigMode, handle)  # (now, after the next reset)
    return bool(mode) and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE


def mig_instances(handle: Any) -> list[Any]:
    """Return the handles of the device's MIG instances."""
    slots = ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
    found = (ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, slot) for slot in range(slots))
    return [instance for instance in found if instance is not None]


def _describe(handle: Any, server: str, index: int) -> GPU | None:
    uuid = text(ask(pynvml.nvmlDeviceGetUUID, handle))
    name = text(ask(pynvml.nvmlDeviceGetName, handle)) or "NVIDIA GPU"
    if not uuid:
        log.warning("GPU %d (%s) does not report its uuid; it is left out of the pool", index, name)
        return None
    memory = memory_of(handle)
    if memory is None or memory[1] < 1:
        log.warning("%s (%s) reports no memory of its own; it is left out of the pool", name, uuid)
        return None
    return GPU(uuid=uuid, server=server, index=index, name=name, memory_mib=memory[1])


def _sample(handle: Any) -> DeviceSample | None:
    uuid = text(ask(pynvml.nvmlDeviceGetUUID, handle))
    if not uuid:
        return None
    load = ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
    memory = memory_of(handle)
    return DeviceSample(
        uuid=uuid,
        busy=None if load is None else load.gpu / 100,
        used_mib=None if memory is None else memory[0],
        total_mib=None if memory is None else memory[1],
    )


def memory_of(handle: Any) -> tuple[int, int] | None:
    """Return (used, grantable) memory in MiB, without the driver's own share if it reports that."""
    info = ask(pynvml.nvmlDeviceGetMemoryInfo, handle, version=pynvml.nvmlMemory_v2)
    if info is not None:
        return info.used // MIB, (info.total - info.reserved) // MIB
    info = ask(pynvml.nvmlDeviceGetMemoryInfo, handle)  # drivers before 510
    return None if info is None else (info.used // MIB, info.total // MIB)


def text(value: Any) -> str:
    """Return text: in some versions of the binding, NVML's strings are bytes."""
    return value.decode() if isinstance(value, bytes) else (value or "")

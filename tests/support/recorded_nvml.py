"""A stand-in for the NVIDIA driver: pynvml's functions answer as written down for some machines.

There is no such hardware where these tests usually run; what is tested is how answers are read, and what follows.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

MIB = 1024 * 1024


class Recorded:
    """The machine. Its devices are dictionaries that a test may change while somebody looks."""

    def __init__(self, devices: list[dict[str, Any]]) -> None:
        self.devices = devices
        self.broken: int | None = None  # what nvmlInit answers, where it fails
        self._events: queue.Queue[Any] = queue.Queue()

    def report(self, index: int, xid: int) -> None:
        """The driver reports an error of that GPU."""
        self._events.put(SimpleNamespace(device=self.devices[index], eventData=xid, eventType=8))

    def initialise(self) -> None:
        if self.broken is not None:
            raise pynvml.NVMLError(self.broken)

    def handle(self, index: int) -> dict[str, Any]:
        if self.devices[index].get("lost"):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return self.devices[index]

    def wait(self, events: Any, milliseconds: int) -> Any:
        try:
            return self._events.get(timeout=milliseconds / 1000)
        except queue.Empty:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT) from None


def install(monkeypatch: pytest.MonkeyPatch, devices: list[dict[str, Any]]) -> Recorded:
    """Until the test is over. What a device does not have written down it does not support."""
    machine = Recorded(devices)

    def answer(field: str) -> Callable[..., Any]:
        def function(device: dict[str, Any], *_: Any, **__: Any) -> Any:
            if field not in device:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return device[field]

        return function

    def instance(device: dict[str, Any], slot: int) -> dict[str, Any]:
        if slot >= len(device["instances"]):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        found: dict[str, Any] = device["instances"][slot]
        return found

    def memory(device: dict[str, Any], version: int | None = None) -> Any:
        if version is not None and device.get("old_driver"):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        if "memory" not in device:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        total, reserved, used = (part * MIB for part in device["memory"])
        return SimpleNamespace(total=total, reserved=reserved, used=used)

    def errors(device: dict[str, Any], kind: int, counter: int) -> int:
        name = {
            (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC): "uncorrected",
            (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_AGGREGATE_ECC): "uncorrected_ever",
            (pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, pynvml.NVML_VOLATILE_ECC): "corrected",
        }[kind, counter]
        count: int = answer(name)(device)
        return count

    replacements: dict[str, Callable[..., Any]] = {
        "nvmlInit": machine.initialise,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "550.54.15",
        "nvmlSystemGetCudaDriverVersion": lambda: 12040,
        "nvmlDeviceGetCount": lambda: len(devices),
        "nvmlDeviceGetHandleByIndex": machine.handle,
        "nvmlDeviceGetUUID": answer("uuid"),
        "nvmlDeviceGetName": answer("name"),
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetMigMode": answer("mig"),
        "nvmlDeviceGetMaxMigDeviceCount": lambda device: 7,
        "nvmlDeviceGetMigDeviceHandleByIndex": instance,
        "nvmlDeviceGetUtilizationRates": answer("load"),
        "nvmlDeviceGetTotalEccErrors": errors,
        "nvmlDeviceGetRemappedRows": answer("rows"),
        "nvmlDeviceGetRetiredPagesPendingStatus": answer("pages"),
        "nvmlDeviceGetTemperature": answer("temperature"),
        "nvmlDeviceGetTemperatureThreshold": answer("slowdown"),
        "nvmlDeviceGetCurrentClocksEventReasons": answer("clocks"),
        "nvmlEventSetCreate": object,
        "nvmlEventSetFree": lambda events: None,
        "nvmlEventSetWait_v2": machine.wait,
        "nvmlDeviceGetSupportedEventTypes": lambda device: device.get("events", 0),
        "nvmlDeviceRegisterEvents": lambda device, kinds, events: None,
    }
    for name, function in replacements.items():
        monkeypatch.setattr(pynvml, name, function, raising=False)
    return machine

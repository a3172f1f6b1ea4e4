"""The slices of a worker: each an emulated or a real GPU. Nothing else in the worker chooses between the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jupyter_gpupool.transport.specs import DeviceSpec

from .cuda_device import CudaDevice
from .device import Device
from .emulated_device import EmulatedDevice


def _kind(spec: DeviceSpec) -> type[EmulatedDevice] | type[CudaDevice]:
    return EmulatedDevice if spec.emulated else CudaDevice


def prepare_process(specs: Sequence[DeviceSpec]) -> None:
    """Set up this process for these slices, before a thread is started and before CUDA is used."""
    for kind in {_kind(spec) for spec in specs}:
        kind.prepare_process([spec for spec in specs if _kind(spec) is kind])


def create_devices(specs: Sequence[DeviceSpec]) -> list[Device]:
    """The slices, in their order. A process sees its real GPUs in that order, too."""
    devices: list[Device] = []
    for spec in specs:
        kind = _kind(spec)
        devices.append(kind(spec, sum(isinstance(d, kind) for d in devices)))
    return devices


def facts(specs: Sequence[DeviceSpec], created: Sequence[Device] = ()) -> list[dict[str, Any]]:
    """What a welcome has of each slice. ``created``: the slices, if they exist already."""
    found = []
    for spec in specs:
        fact = {"uuid": spec.uuid, "name": spec.name, "limit_mib": spec.limit_mib, "emulated": spec.emulated}
        overheads = [device.overhead for device in created if device.spec.uuid == spec.uuid]
        found.append({**fact, "overhead_bytes": overheads[0]} if overheads else fact)
    return found


def can_become(device: Device, spec: DeviceSpec) -> bool:
    """Whether this process could go on with another slice in place of that one, while its memory is parked."""
    return isinstance(device, _kind(spec)) and device.can_become(spec)

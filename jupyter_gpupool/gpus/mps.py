"""CUDA's multi-process service (MPS): whether it runs here, and the hard limits that it sets a process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from jupyter_gpupool.transport.specs import DeviceSpec

_FOLDER = "/tmp/nvidia-mps"  # NVIDIA's default

#: What MPS reads in the environment of a process: its limits of memory, and its share of the processors in percent.
MPS_VARIABLES = ("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")


def mps_runs() -> bool:
    """Return whether the control daemon of CUDA's multi-process service runs here."""
    folder = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or _FOLDER)
    try:
        pid = int((folder / "nvidia-cuda-mps-control.pid").read_text().strip())
        return bool(psutil.pid_exists(pid))
    except (OSError, ValueError):
        return False


def mps_limits(devices: Sequence[DeviceSpec]) -> dict[str, str]:
    """Return the variables with which MPS limits a process to these slices, its CUDA_VISIBLE_DEVICES in their order.

    Memory is limited for each device. There is one share of the processors for all devices of a process: that of the
    largest slice. A MIG instance is a whole device, and so is what no driver divides.
    """
    real = [device for device in devices if not device.emulated]
    if not real:
        return {}
    memory = ",".join(f"{ordinal}={device.limit_mib}M" for ordinal, device in enumerate(real))
    share = max(-(-100 * device.limit_mib // max(1, device.total_mib)) for device in real)
    return dict(zip(MPS_VARIABLES, (memory, str(min(100, max(1, share))))))

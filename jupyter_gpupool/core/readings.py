"""A GPU server's health readings at one moment. None means not reported; sizes are in MiB.

Plain types only, so that a reading can be taken on one machine and evaluated on another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GPUReading:
    """One physical device. ``covers``: the uuids of the pool's GPUs on it, several in MIG mode.

    ``uncorrected`` counts double-bit errors since the driver was loaded or the GPU was reset, ``uncorrected_ever``
    over its lifetime. ``throttled``: reasons why its clocks are reduced now. ``xids``: (number, time) of its last
    errors.
    """

    uuid: str
    index: int
    name: str
    covers: tuple[str, ...]
    memory_mib: int | None = None
    uncorrected: int | None = None
    uncorrected_ever: int | None = None
    corrected: int | None = None
    remapping_failed: bool | None = None
    needs_reset: bool | None = None
    temperature_c: int | None = None
    slowdown_c: int | None = None
    throttled: tuple[str, ...] | None = None
    xids: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ServerReading:
    """One machine. ``at`` is its own clock, in seconds since the epoch.

    ``no_driver``: why NVML is not usable (empty: it is). ``free_mib``: free disk space by folder. ``link_mbit``: speed
    of the network interface in Mbit/s. ``sandbox``: why the workers lack each layer of their sandbox, empty if they
    have it; known once the process that starts workers is ready. ``bounds``: the same of what bounds
    the workers' use of the machine.
    """

    server: str
    at: float
    driver: str | None = None
    cuda: str | None = None
    no_driver: str = "no NVIDIA driver here"
    driver_expected: bool = False
    gpus: tuple[GPUReading, ...] = ()
    memory_mib: int | None = None
    available_mib: int | None = None
    free_mib: Mapping[str, int] | None = None
    open_files: int | None = None
    open_files_limit: int | None = None
    interface: str = ""
    mtu: int | None = None
    link_mbit: int | None = None
    mps: bool | None = None
    torch: str | None = None
    clock_ahead_s: float | None = None
    sandbox: Mapping[str, str] | None = None
    bounds: Mapping[str, str] | None = None


def from_json(data: Mapping[str, Any]) -> ServerReading:
    """Return the reading from the JSON form of its ``dataclasses.asdict``."""
    gpus = tuple(
        GPUReading(
            **{
                **gpu,
                "covers": tuple(gpu["covers"]),
                "throttled": None if gpu["throttled"] is None else tuple(gpu["throttled"]),
                "xids": tuple((number, at) for number, at in gpu["xids"]),
            }
        )
        for gpu in data["gpus"]
    )
    return ServerReading(**{**data, "gpus": gpus})

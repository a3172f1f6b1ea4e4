"""What one GPU server says of itself at one moment. None stands for what it does not tell; sizes are in MiB.

Values only, of plain types, so that a reading can be made on one machine and judged on another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GPUReading:
    """One physical device. ``covers``: the uuids that the pool knows it by, several in MIG mode.

    ``uncorrected`` counts double-bit errors since the driver was loaded or the GPU was reset, ``uncorrected_ever``
    since it was made. ``throttled`` names what slows its clocks now. ``xids``: (number, when) of its last errors.
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
    """One machine. ``at`` is its own clock, in seconds since the epoch; ``no_driver`` says why NVML cannot be asked
    (empty: it can). ``free_mib``: free space by folder. ``link_mbit``: speed of the interface, as far as it says."""

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


def from_json(data: Mapping[str, Any]) -> ServerReading:
    """The reading that ``dataclasses.asdict`` and JSON made of one."""
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

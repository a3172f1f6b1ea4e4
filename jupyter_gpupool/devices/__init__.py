"""What GPUs this machine has: real ones through NVML, or emulated ones."""

from __future__ import annotations

from typing import Literal

from ..pool.models import GPU
from .emulated import DEFAULT_COUNT, DEFAULT_MEMORY_MIB, DEFAULT_NAME, emulated_gpus

Emulate = Literal["auto", "always", "never"]

__all__ = ["Emulate", "discover", "emulated_gpus"]


def discover(
    server: str,
    emulate: Emulate = "auto",
    *,
    count: int = DEFAULT_COUNT,
    name: str = DEFAULT_NAME,
    memory_mib: int = DEFAULT_MEMORY_MIB,
) -> tuple[GPU, ...]:
    """The GPUs that ``server`` (this machine, under that name) offers.

    ``auto``: the real ones, or emulated ones where there is none; ``always``: emulated ones only;
    ``never``: real ones or nothing. ``count``, ``name`` and ``memory_mib`` describe the emulated
    ones. Raises ValueError for another word or an impossible description.
    """
    if emulate not in ("auto", "always", "never"):
        raise ValueError(f"emulate is one of auto, always and never, not {emulate!r}")
    if emulate != "always":
        from .nvml import nvml_gpus  # only where it is needed: emulation works without pynvml

        real = nvml_gpus(server)
        if real or emulate == "never":
            return real
    return emulated_gpus(server, count, name, memory_mib)

"""The GPUs of this machine: real ones, found with NVML, or emulated ones."""

from __future__ import annotations

from typing import Literal

from jupyter_gpupool.core.models import GPU

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
    """Return the GPUs of this machine, under the server name ``server``.

    ``auto``: the real ones, or emulated ones if there are none; ``always``: emulated ones only;
    ``never``: real ones only. ``count``, ``name`` and ``memory_mib`` describe the emulated
    ones. Raises ValueError for any other value or an impossible description.
    """
    if emulate not in ("auto", "always", "never"):
        raise ValueError(f"emulate must be auto, always or never, not {emulate!r}")
    if emulate != "always":
        from .nvml import nvml_gpus  # only if needed: emulation works without pynvml

        real = nvml_gpus(server)
        if real or emulate == "never":
            return real
    return emulated_gpus(server, count, name, memory_mib)

"""Which layers a worker's sandbox has: as set, as far as the kernel allows, and as its GPUs permit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

#: What each layer closes; they are entered in this order.
NAMESPACES, MOUNTS, PRIVILEGES, FILES, SYSTEM_CALLS = LAYERS = (
    *("namespaces", "mounts"),
    *("privileges", "files", "system calls"),
)
#: What each of these closes, another one closes, too, but for names and sizes of files; many containers refuse them.
_OPTIONAL = (NAMESPACES, MOUNTS)

Mode = Literal["auto", "require", "off"]


def missing(
    mode: Mode, lacks: Mapping[str, str], real: bool, driver_is_loaded: bool = True
) -> dict[str, str]:
    """Return why a worker lacks each layer, in order; empty for a layer that it has.

    ``lacks``: why the kernel has not each. ``real``: the lease has a GPU that is not emulated. ``driver_is_loaded``:
    no program that needs privileges has to load it when the GPU is first used.
    """
    found = {}
    for layer in LAYERS:
        why = lacks.get(layer, "")
        if mode == "off":
            why = "sandbox is set to 'off'"
        elif mode == "auto" and real and not why:
            if layer in (NAMESPACES, MOUNTS, FILES):
                why = "with GPUs that are not emulated it is on only if sandbox is set to 'require'"
            elif not driver_is_loaded:
                why = "the NVIDIA driver's module for CUDA is loaded by the first worker, which needs privileges"
        found[layer] = why
    return found


def objection(mode: Mode, lacks: Mapping[str, str]) -> str:
    """Return why no worker may start, where the sandbox is required; empty if nothing is wrong."""
    if mode != "require":
        return ""
    return "; ".join(f"{layer}: {why}" for layer, why in lacks.items() if why and layer not in _OPTIONAL)

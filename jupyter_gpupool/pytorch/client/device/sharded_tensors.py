"""Sharded tensors (DTensor) on slices: they are where their parts are, and each rank draws its own random numbers.

PyTorch's core, which makes a sharded tensor, knows the device of its part by the name gpupool only.

On emulated GPUs each rank draws the random numbers of its own part, as on the CPU. DTensor moves the counter of a
GPU's generator so that a rank draws its part of what one device would draw. An emulated GPU has the CPU's generator,
which has no counter.
"""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.after_import import after_import
from jupyter_gpupool.pytorch.client.tensor.device_names import BACKEND
from jupyter_gpupool.pytorch.torch_internals.client import SUPPORTS_RANDOM, part_of_sharded

_USERS = "torch.distributed.tensor._dispatch"
_CLASSES = "torch.distributed.tensor"
_installed = False


def install() -> None:
    """Prepare DTensor, once the program imports it."""
    global _installed
    if not _installed:
        _installed = True
        after_import(_USERS, _draw)
        after_import(_CLASSES, _place)


def _place() -> None:
    sharded = sys.modules[_CLASSES].DTensor
    sharded.device = property(lambda self: part_of_sharded(self).device)
    sharded.is_cuda = property(lambda self: part_of_sharded(self).is_cuda)


def _draw() -> None:
    native = SUPPORTS_RANDOM[0].get()

    @functools.wraps(native)
    def is_rng_supported_mesh(device_mesh: Any) -> bool:
        if not _is_emulated(device_mesh.device_type):
            return bool(native(device_mesh))
        warnings.warn(
            "on emulated GPUs each rank draws the random numbers of its own part of a sharded tensor",
            stacklevel=2,
        )
        return False

    for place in SUPPORTS_RANDOM:
        place.set(is_rng_supported_mesh)


def _is_emulated(device_type: str) -> bool:
    session = attachment.current()
    if session is None or device_type not in ({BACKEND, "cuda"} if device_names.cuda_is_ours else {BACKEND}):
        return False
    return any(device.emulated for device in session.spec.devices)

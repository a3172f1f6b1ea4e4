"""Moves a notebook's tensors to the CPU when their slices are released."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from jupyter_gpupool.core.errors import SliceInUse


def clear(names: Mapping[str, Any], *, drop: bool = False, force: bool = False) -> str:
    """Move the tensors on the slices to the CPU, in place.

    Returns one line for the user, or "" if there were no tensors.
    ``names`` are the notebook's variables, which name the tensors in messages. With ``drop``, no tensor is moved and
    all are lost. Raises SliceInUse if some tensors cannot be moved, unless ``force`` gives them up.
    """
    if "jupyter_gpupool.pytorch.client.tensor.tensor" not in sys.modules:
        return ""  # PyTorch has not been imported
    from jupyter_gpupool.pytorch.client import evacuate

    found = evacuate.live()
    if not found:
        return ""
    what = evacuate.summary(found, names)
    if drop:
        return f"lost with it: {what}"
    left = evacuate.bring_home(found)
    if not left:
        return f"moved to the CPU: {what}"
    lost = evacuate.summary(left, names)
    if force:
        return f"moved to the CPU: {what}, but lost of it: {lost}"
    raise SliceInUse(
        f"{lost} cannot be moved to the CPU, because autograd or something else still refers to them; "
        "delete what holds them, or release with --force and lose them"
    )

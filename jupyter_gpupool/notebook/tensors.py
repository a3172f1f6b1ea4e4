"""What becomes of a notebook's tensors when the slices that they are on are given back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ..pool.errors import InUse


def clear(names: Mapping[str, Any], *, drop: bool = False, force: bool = False) -> str:
    """Move what is on the slices to the CPU, in place; what became of it, for people ("" if there was nothing).

    ``names`` are the notebook's variables, by which tensors are called. ``drop``: move nothing, all is lost.
    Raises InUse where some cannot be moved, unless ``force`` lets them be lost.
    """
    if "jupyter_gpupool.remote.tensor" not in sys.modules:
        return ""  # PyTorch has not been imported
    from ..remote import live

    found = live.live()
    if not found:
        return ""
    what = live.summary(found, names)
    if drop:
        return f"lost with it: {what}"
    left = live.bring_home(found)
    if not left:
        return f"moved to the CPU: {what}"
    lost = live.summary(left, names)
    if force:
        return f"moved to the CPU: {what}, but lost of it: {lost}"
    raise InUse(
        f"{lost} cannot be moved to the CPU, because autograd or something else still refers to them; "
        "delete what holds them, or release with --force and lose them"
    )

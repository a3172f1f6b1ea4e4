"""PyTorch's ``torch.backends`` entry point: runs at the end of every ``import torch``."""

from __future__ import annotations

import os

#: Names the file with this process's lease (see specs.AttachSpec); set by whoever holds the lease.
VARIABLE = "GPUPOOL_LEASE"


def activate() -> None:
    """Attach this process to the lease that its environment names; without one, do nothing at all.

    Raises RuntimeError with one line when the file is there no more.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return
    from .specs import AttachSpec

    try:
        with open(path) as f:
            spec = AttachSpec.from_json(f.read())
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise RuntimeError(
            f"{VARIABLE} names {path}, which cannot be read ({e}); the lease has probably been released. "
            f"Unset {VARIABLE}, or request a lease again."
        ) from None
    from . import session

    session.activate(spec)

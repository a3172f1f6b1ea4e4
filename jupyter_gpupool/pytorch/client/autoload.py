"""The entry point in PyTorch's group ``torch.backends``: runs at the end of every ``import torch``."""

from __future__ import annotations

import os

#: The environment variable with the path of this process's lease (specs.AttachSpec); its holder sets it.
VARIABLE = "GPUPOOL_LEASE"


def activate() -> None:
    """Attach the lease that the environment names to this process. Without one, do nothing.

    Raises RuntimeError with one line if the file cannot be read.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return
    from jupyter_gpupool.transport.specs import AttachSpec

    try:
        with open(path) as f:
            spec = AttachSpec.from_json(f.read())
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise RuntimeError(
            f"{VARIABLE} names {path}, which cannot be read ({e}); the lease has probably been released. "
            f"Unset {VARIABLE}, or request GPUs again."
        ) from None
    from . import session

    session.activate(spec)

"""The entry point in JAX's group ``jax_plugins``: runs when a program first uses JAX's devices."""

from __future__ import annotations

import os

#: The environment variable with the path of this process's lease (specs.AttachSpec); its holder sets it.
VARIABLE = "GPUPOOL_LEASE"


def initialize() -> None:
    """Let the leased GPUs be JAX's ``cuda`` devices. Without a lease, do nothing."""
    if os.environ.get(VARIABLE):
        from . import registration

        registration.register(os.environ[VARIABLE])

"""The frameworks beside PyTorch whose sessions workers serve.

Each is imported before the workers are forked, where it is installed, or when its first session begins.
"""

from __future__ import annotations

import contextlib
from typing import Any


def _begin_jax(*arguments: Any) -> Any:
    try:
        from jupyter_gpupool.jax.worker.session import JaxSession
    except ImportError as e:
        raise ImportError(
            f"the GPU server has no JAX ({e}); install jupyter_gpupool[jax] there, or use the slice by PyTorch"
        ) from None
    return JaxSession(*arguments)


#: What begins a session, by the framework that a client's hello names.
FRAMEWORKS = {"jax": _begin_jax}


def preload() -> None:
    """Import what is installed, for workers that are forked from here. None of it starts a thread by that."""
    with contextlib.suppress(Exception):  # a worker says what is wrong, to a client that wants it
        from jupyter_gpupool.jax.worker import session  # noqa: F401

"""Attach slices of pooled, remote GPUs to notebooks and to any Python process.

Public names are imported when they are first used. So this package costs nothing to Jupyter Server, which imports it
to find its extension, and to PyTorch, which imports it at the end of ``import torch``.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._version import __version__
    from .core.errors import (
        EngineError,
        ImpossibleRequest,
        InvalidRequest,
        LeaseEnded,
        NoCapacity,
        PermissionDenied,
        PoolError,
        PoolUnreachable,
        SliceInUse,
        TooManyAttempts,
        Unauthenticated,
        UnknownLease,
    )
    from .lease import AlreadyAttached, Lease, attach
    from .notebook.widgets.monitor import Monitor
    from .notebook.widgets.picker import Picker

__all__ = [
    "AlreadyAttached",
    "EngineError",
    "ImpossibleRequest",
    "InvalidRequest",
    "Lease",
    "LeaseEnded",
    "Monitor",
    "NoCapacity",
    "PermissionDenied",
    "Picker",
    "PoolError",
    "PoolUnreachable",
    "SliceInUse",
    "TooManyAttempts",
    "Unauthenticated",
    "UnknownLease",
    "__version__",
    "attach",
]

#: Public names that are not errors of the pool, and the module that defines each.
_MODULES = {
    "AlreadyAttached": "lease",
    "Lease": "lease",
    "Monitor": "notebook.widgets.monitor",
    "Picker": "notebook.widgets.picker",
    "__version__": "_version",
    "attach": "lease",
}


#: Beside this package where it was copied into a container (kubernetes/client_copy.py): what it imports.
DEPENDENCIES = "gpupool-dependencies"
_copied = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), DEPENDENCIES)
if os.path.isdir(_copied) and _copied not in sys.path:
    sys.path.append(_copied)  # last: the image's own packages stay what they are


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES.get(name, 'core.errors')}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext jupyter_gpupool``"""
    from .notebook import extension

    extension.load(shell)


def unload_ipython_extension(shell: Any) -> None:
    from .notebook import extension

    extension.unload(shell)


def _jupyter_gpupool_call(name: str, arguments: str) -> Any:
    """Run one of the calls that a frontend evaluates in a kernel, and return its answer.

    ``name`` is a key of ``notebook.frontend_calls.CALLS``, ``arguments`` a JSON array. A frontend knows no other name
    of this package, so the modules inside may move.
    """
    import json

    from .notebook import frontend_calls

    return frontend_calls.CALLS[name](*json.loads(arguments))


def _jupyter_labextension_paths() -> list[dict[str, str]]:
    """Return where the built labextension is, and the name that JupyterLab gives it."""
    return [{"src": "labextension", "dest": "jupyter-gpupool"}]


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    from .jupyter.extension import GPUPoolExtension

    return [{"module": "jupyter_gpupool", "app": GPUPoolExtension}]

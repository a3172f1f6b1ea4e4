"""Attach slices of pooled, remote GPUs to notebooks and to any Python process.

``attach()`` and ``Lease`` are imported when they are first used, so that Jupyter Server, which imports this
package to find its extension, and PyTorch, which imports it at the end of ``import torch``, pay nothing for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._version import __version__
    from .face import Lease, attach
    from .notebook.monitor import Monitor
    from .notebook.picker import Picker

__all__ = ["Lease", "Monitor", "Picker", "__version__", "attach"]


def __getattr__(name: str) -> Any:
    if name in ("attach", "Lease"):
        from . import face

        return getattr(face, name)
    if name == "Picker":
        from .notebook import picker

        return picker.Picker
    if name == "Monitor":
        from .notebook import monitor

        return monitor.Monitor
    if name == "__version__":
        from ._version import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext jupyter_gpupool``"""
    from .notebook import extension

    extension.load(shell)


def unload_ipython_extension(shell: Any) -> None:
    from .notebook import extension

    extension.unload(shell)


def _jupyter_labextension_paths() -> list[dict[str, str]]:
    """Where the built labextension is, and the name under which JupyterLab knows it."""
    return [{"src": "labextension", "dest": "jupyter-gpupool"}]


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    from .jupyter.extension import GPUPoolExtension

    return [{"module": "jupyter_gpupool", "app": GPUPoolExtension}]

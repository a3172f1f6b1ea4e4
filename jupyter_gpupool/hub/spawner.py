"""``c.JupyterHub.spawner_class = "gpupool"``: servers run as processes on the hub's machine, with GPUs of the pool."""

from __future__ import annotations

from typing import Any

from jupyterhub.spawner import LocalProcessSpawner
from traitlets import Bool

from jupyter_gpupool.core.errors import InvalidRequest


class GPUPoolSpawner(LocalProcessSpawner):
    """A LocalProcessSpawner that refuses to start a server if ``configure(c)`` was not called.

    The pool does not need it: any other spawner works as well.
    """

    gpupool_required = Bool(
        True,
        help="Whether to refuse to start a server if `jupyter_gpupool.hub.configure(c)` was not called.",
    ).tag(config=True)

    async def start(self) -> Any:
        """Start the server. Raises InvalidRequest if ``configure(c)`` was not called."""
        if self.gpupool_required and not hasattr(self, "_gpupool_progress"):
            raise InvalidRequest(
                "the server was not started: this hub's configuration does not set up the GPU pool; add at its end: "
                "from jupyter_gpupool.hub import configure; configure(c)"
            )
        return await super().start()

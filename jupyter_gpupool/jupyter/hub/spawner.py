"""``c.JupyterHub.spawner_class = "gpupool"``: servers as processes of the hub's own machine, with GPUs of the pool."""

from __future__ import annotations

from jupyterhub.spawner import LocalProcessSpawner
from traitlets import Bool

from ...pool.errors import InvalidRequest


class GPUPoolSpawner(LocalProcessSpawner):
    """LocalProcessSpawner, which will not start without what ``configure`` puts around it.

    Any other spawner does as well: the pool needs none of its own.
    """

    gpupool_required = Bool(
        True,
        help="Whether a server may only start where `jupyter_gpupool.jupyter.hub.configure(c)` was called.",
    ).tag(config=True)

    async def start(self):
        if self.gpupool_required and not hasattr(self, "_gpupool_progress"):
            raise InvalidRequest(
                "this hub's configuration lacks its last lines: "
                "from jupyter_gpupool.jupyter.hub import configure; configure(c)"
            )
        return await super().start()

"""The former name of :mod:`jupyter_gpupool.notebook.frontend_calls`. Older frontends send it to kernels."""

from .frontend_calls import *  # noqa: F403

"""The former place of :mod:`jupyter_gpupool.hub`; kept until 1.0 for configuration files that name it."""

import warnings

from jupyter_gpupool.hub import *  # noqa: F403  every public name, as before
from jupyter_gpupool.hub import __all__  # noqa: F401

warnings.warn(
    "jupyter_gpupool.jupyter.hub is now jupyter_gpupool.hub; the old name works until 1.0",
    DeprecationWarning,
    stacklevel=2,
)

"""JupyterHub: slices of the pool's GPUs as an option of a server. In ``jupyterhub_config.py``, last::

from jupyter_gpupool.jupyter.hub import configure
configure(c)
"""

from .configuration import configure
from .options import Limits

__all__ = ["Limits", "configure"]

"""JupyterHub: users choose GPU slices on the spawn page. At the end of ``jupyterhub_config.py``::

    from jupyter_gpupool.hub import configure

    configure(c)

See docs/how-to/jupyterhub.md.
"""

from .configuration import configure
from .options import Limits

__all__ = ["Limits", "configure"]

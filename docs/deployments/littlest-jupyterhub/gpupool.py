# /opt/tljh/config/jupyterhub_config.d/gpupool.py
# GPUs of this one machine, offered on the spawn page and used directly.
from jupyter_gpupool.hub import Limits, configure

configure(
    c,  # noqa: F821
    # A server has its GPUs from its start to its stop.
    mode="server",
    # The GPUs are in this machine: CUDA uses them itself, with a cap on memory. "remote" would send all work through
    # the pool's workers, which are then the only processes that need to see a GPU.
    attach="auto",
    limits=Limits(max_gpus=2, least=0.1, step=0.1),
    # A user's first group at the hub is the namespace of the pool.
    directory="/opt/tljh/state/gpupool",
    options=["--LocalEngine.emulate=never"],
)

# On the hub: /etc/jupyterhub/jupyterhub_config.py, or the lines that yours lacks.
import os

from jupyter_gpupool.hub import Limits, configure

c = get_config()  # noqa: F821

# The farm asks this address who is who; so do the users' servers.
c.JupyterHub.hub_ip = "0.0.0.0"
c.JupyterHub.hub_connect_ip = "hub.example"
# What the proxy sends on to the farm is TLS, by the farm's own authority.
c.ConfigurableHTTPProxy.command = [
    "configurable-http-proxy",
    "--client-ssl-ca=/etc/jupyterhub/gpupool-ca.crt",
]

configure(
    c,
    url="https://farm.example:10101",
    # The farm's service is not the hub's to start.
    managed=False,
    # The same at both ends: `openssl rand -hex 32`.
    api_token=os.environ["GPUPOOL_HUB_TOKEN"],
    ca_file=os.environ.get("GPUPOOL_CA_FILE", "/etc/jupyterhub/gpupool-ca.crt"),
    # The spawn option is what each kernel is given and the most that a user's kernels have together.
    mode="kernel",
    limits=Limits(max_gpus=4),
    # Groups of the hub, and whose share of the pool theirs is.
    namespaces={"vision": "vision", "speech": "speech"},
)

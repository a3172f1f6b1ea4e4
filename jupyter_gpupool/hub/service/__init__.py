"""The hub's service: one pool for all users of a JupyterHub."""

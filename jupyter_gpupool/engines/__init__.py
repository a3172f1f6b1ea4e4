"""How a pool starts workers on GPU servers: on this machine, or on the nodes of a Ray cluster."""

"""A framed TLS connection to a worker. Independent of PyTorch and of the pool."""

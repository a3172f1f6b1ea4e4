"""JAX on leased GPUs: a PJRT plugin in the client's process, and what executes its programs in the worker's."""

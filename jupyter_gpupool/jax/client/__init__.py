"""The PJRT plugin: JAX's devices in a process that holds a lease."""

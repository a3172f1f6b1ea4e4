"""What executes a JAX client's programs on the slices of its lease."""

"""The names of JAX that are not public, by the process that uses them. Nothing else in this package uses such names."""

"""What the plugin and the worker say to each other. Imports no JAX, and NumPy only where a type is asked for."""

"""In a Jupyter server: its pool, the GPU slices of its kernels, and its HTTP calls."""

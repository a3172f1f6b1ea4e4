"""In a kernel: %gpupool, the widgets, and the calls that a frontend makes."""

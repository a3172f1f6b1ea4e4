"""Health of the GPUs and their machine: readers, the diagnosis, and the thread that reads."""

"""What a worker may take of its machine besides the GPU: memory, processes, processor time, disk."""

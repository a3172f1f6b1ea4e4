"""``torch.gpupool`` and the hooks of PyTorch's out-of-tree backend."""

"""Every name of PyTorch that this package uses and that PyTorch does not promise to keep, with the reason."""

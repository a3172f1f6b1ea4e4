"""``torch.cuda`` for the slices of the lease."""

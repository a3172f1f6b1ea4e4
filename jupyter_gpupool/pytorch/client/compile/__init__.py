"""``torch.compile`` for remote tensors."""

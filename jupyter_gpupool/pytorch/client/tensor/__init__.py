"""Remote tensors, and the stream of commands to their worker."""

"""The holder's process: tensors whose data is on a GPU server."""

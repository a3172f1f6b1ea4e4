"""The device against PyTorch's own operator suite (OpInfo), sample by sample, with the CPU as the reference."""

"""What is computed: PyTorch's operators, sent by the client and executed by the worker."""

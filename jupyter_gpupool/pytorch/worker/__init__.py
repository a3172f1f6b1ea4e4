"""The GPU server's process: executes one lease's operators."""

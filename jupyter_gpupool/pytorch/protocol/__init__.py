"""What the client and the worker agree on."""

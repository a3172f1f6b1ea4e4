"""What a worker is shut in, after it was forked and before it reads the first byte of a client."""

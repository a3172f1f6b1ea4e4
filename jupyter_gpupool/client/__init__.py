"""The client of the pool's HTTP API. Needs only httpx and the standard library."""

"""Kubernetes: what a Pod asks of the pool, and what the webhook puts into it."""

"""The pool as a service: HTTP, authentication, observation of GPUs, and the daemon."""

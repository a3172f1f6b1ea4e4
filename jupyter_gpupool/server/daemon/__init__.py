"""The programs that run a pool: ``gpupool server`` and the pool of a single user."""

"""What a watcher of the pool is shown."""

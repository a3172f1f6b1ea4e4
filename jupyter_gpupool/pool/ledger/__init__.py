"""The database in which the pool writes down every change before it acts on it."""

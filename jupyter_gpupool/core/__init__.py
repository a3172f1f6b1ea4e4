"""Values that every room shares. Imports nothing of ours, and only the standard library."""

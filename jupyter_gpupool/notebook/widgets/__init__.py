"""Widgets that show the pool inside a notebook."""

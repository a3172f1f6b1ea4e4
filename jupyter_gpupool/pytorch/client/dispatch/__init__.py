"""Turns the program's calls of operators into commands."""

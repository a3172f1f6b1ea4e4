"""Benchmarks, each measured beside its reference in the same run; `make bench` runs all of them."""

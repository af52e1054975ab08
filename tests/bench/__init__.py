"""Benchmarks. `python -m tests.bench` runs them all and prints one table for each; pytest does not collect them."""

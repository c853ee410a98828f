"""Benchmarks as a product: the floor, the naive way and ours, in turn in one process (``ivg bench``)."""

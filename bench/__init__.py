"""Benchmarks: `python -m bench.decode` and `bench.model` write CSV, `bench.plot` draws it."""

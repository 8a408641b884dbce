"""Benchmarks; each runs as `python -m deltanet.benchmarks.<name>` and writes its figures to results/."""

"""Synthetic tasks with training sweeps: `python -m deltanet.eval.synthetic` (see `eval/README.md`)."""

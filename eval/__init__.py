"""Evaluation with lm-eval: `python -m deltanet.eval MODEL --suite paper|recall|ruler|smoke` (see `eval/README.md`)."""

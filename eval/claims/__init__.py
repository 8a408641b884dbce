"""The paper's claims on real runs: `python -m deltanet.eval.claims.NAME`; the findings are in `eval/RESULTS.md`."""

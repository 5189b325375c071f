"""Stage 1: `split` in portable Triton, `cdna3` and `cdna4` in Gluon. Stage 2: `combine`."""

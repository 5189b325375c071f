"""Stage 1: `split` in portable Triton, `cdna3`, `cdna4`, `sm90` in Gluon. Stage 2: `combine`."""

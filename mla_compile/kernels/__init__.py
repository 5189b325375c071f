"""Portable Triton kernels: `split` is stage 1, `combine` stage 2, `decode` launches them."""

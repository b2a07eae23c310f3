"""Triton kernels for packed deltas, each beside a plain torch reference."""

"""Compress, verify and reconstruct fine-tunes as packed deltas to their backbone."""

__version__ = "0.1.0"

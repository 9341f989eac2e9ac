"""Checkpoints of other packages, in and out."""

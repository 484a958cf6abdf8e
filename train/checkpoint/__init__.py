"""Checkpoints: written, read, held, pruned."""

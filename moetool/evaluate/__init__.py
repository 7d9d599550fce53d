"""Checks of a finished checkpoint: structure, bytes, blocks, logits."""

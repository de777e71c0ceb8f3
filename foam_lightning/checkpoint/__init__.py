"""Checkpoints on disk: written atomically, checked, and loaded back into a model."""

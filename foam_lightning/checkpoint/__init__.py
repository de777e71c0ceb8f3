"""Checkpoints on disk: written atomically, checked for damage, and loaded into a model."""

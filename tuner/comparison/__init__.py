"""Optimizers compared on one job."""

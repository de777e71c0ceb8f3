"""Trials: short training runs, the Optuna studies that choose them, and their results."""

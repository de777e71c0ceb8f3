"""Short training runs, the Optuna studies that order them, and their results."""

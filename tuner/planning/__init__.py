"""Plans that fit a budget, without training."""

"""LLaMA through transformers: configuration, weights, loss."""

"""Text in, batches of token rows out, in an order that survives an interruption."""

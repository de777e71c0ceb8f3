"""The memory account: predict the peak of a training step, term by term, before it runs."""

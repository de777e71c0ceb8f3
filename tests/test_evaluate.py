import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.evaluate import biased_loss, format_perplexity


@given(st.lists(st.floats(min_value=0, max_value=12), min_size=1, max_size=200))
def test_the_biased_loss_counts_one_batch_too_many(losses: list[float]) -> None:
    mean = math.fsum(losses) / len(losses)
    assert biased_loss(mean, len(losses)) == pytest.approx(sum(losses) / (len(losses) + 1))


def test_the_biased_perplexity_is_printed_only_on_request() -> None:
    assert format_perplexity(3.4, 1000) == "loss 3.4000 nats, perplexity 29.96, over 1000 tokens"
    first, second = format_perplexity(3.4, 1000, num_batches=100).splitlines()
    assert first == format_perplexity(3.4, 1000)
    assert "28.97" in second
    assert second.endswith("100 batches divided by 101")

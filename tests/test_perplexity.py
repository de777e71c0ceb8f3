import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.evaluate import format_perplexity, published_loss


@given(
    st.lists(st.floats(min_value=0, max_value=12), min_size=1, max_size=200),
)
def test_the_published_form_counts_one_batch_too_many(losses: list[float]) -> None:
    total, count = 0.0, 1
    for loss in losses:
        total += loss
        count += 1
    mean = math.fsum(losses) / len(losses)
    assert published_loss(mean, len(losses)) == pytest.approx(total / count)


def test_the_published_form_is_said_only_on_request() -> None:
    assert format_perplexity(3.4, 1000) == "loss 3.4000 nats, perplexity 29.96, over 1000 tokens"
    first, second = format_perplexity(3.4, 1000, num_batches=100).splitlines()
    assert first == format_perplexity(3.4, 1000)
    assert second.startswith("perplexity 28.97 as the released FOAM code would print it: ")
    assert second.endswith("the losses of 100 batches divided by 101")

import pytest
import torch
from torch import nn

from foam_lightning.model import loss
from foam_lightning.model.loss import IGNORED, token_loss
from tests.support.unequal import BATCH, job_of_unequal_rows, trained

H, V = 8, 50


def example(rows=3, length=200, dtype=torch.float32):
    hidden = torch.randn(rows, length, H, dtype=dtype, requires_grad=True)
    head = nn.Linear(H, V, bias=False, dtype=dtype)
    labels = torch.randint(0, V, (rows, length))
    labels[0, 5:90] = IGNORED
    return hidden, head, labels


def by_hand(hidden, head, labels):
    """Sum over positions one by one, in float64."""
    log_p = (hidden.detach().double() @ head.weight.detach().double().T).log_softmax(-1)
    total, count = 0.0, 0
    for row in range(len(labels)):
        for position in range(labels.shape[1] - 1):
            target = int(labels[row, position + 1])
            if target != IGNORED:
                total -= float(log_p[row, position, target])
                count += 1
    return total, count


@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "chunked"])
def test_the_loss_is_the_sum_over_labelled_tokens(chunked):
    hidden, head, labels = example()
    total, count = token_loss(hidden, head, labels, chunked=chunked)
    expected, expected_count = by_hand(hidden, head, labels)
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)
    assert int(count) == expected_count
    assert count.dtype == torch.int64


def test_chunks_change_neither_the_loss_nor_a_gradient():
    hidden, head, labels = example()
    found = []
    for chunked in (False, True):
        total, _ = token_loss(hidden, head, labels, chunked=chunked)
        found.append((total.detach(), *torch.autograd.grad(total, [hidden, head.weight])))
    for plain, chunked_ in zip(*found, strict=True):
        torch.testing.assert_close(chunked_, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "chunked"])
def test_ignored_labels_get_no_gradient(chunked):
    hidden, head, labels = example()
    total, _ = token_loss(hidden, head, labels, chunked=chunked)
    (grad,) = torch.autograd.grad(total, hidden)
    assert not grad[0, 4:89].any()  # what these would predict is ignored
    assert not grad[:, -1].any()  # nothing follows the last position
    assert grad[0, 3].any()
    assert grad[0, 89].any()


@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "chunked"])
def test_the_loss_of_bfloat16_weights_is_float32(chunked):
    hidden, head, labels = example(dtype=torch.bfloat16)
    total, _ = token_loss(hidden, head, labels, chunked=chunked)
    assert total.dtype == torch.float32
    logits = head(hidden[:, :-1]).float().flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-3)


class RecordingHead(nn.Linear):
    """Records the number of tokens of every call."""

    def __init__(self):
        super().__init__(H, V, bias=False)
        self.sizes = []

    def forward(self, states):
        self.sizes.append(len(states))
        return super().forward(states)


def chunk_sizes(rows, length):
    hidden, _, labels = example(rows, length)
    head = RecordingHead()
    with torch.no_grad():
        token_loss(hidden, head, labels, chunked=True)
    return head.sizes


def test_chunks_have_at_least_256_tokens_and_are_at_most_64():
    assert chunk_sizes(2, 301) == [256, 256, 88]
    assert chunk_sizes(1, 64 * 300 + 1) == [300] * 64


@pytest.mark.parametrize("length", [2, 3, 86, 129, 200, 256, 257, 258, 2048])
def test_fewer_rows_than_the_minimum_are_one_chunk(length):
    rows = loss.min_rows_for_chunks(length)
    assert len(chunk_sizes(rows, length)) > 1
    if rows > 1:
        assert len(chunk_sizes(rows - 1, length)) == 1


# ---- the mean over an optimizer step


@pytest.fixture
def unequal(new_job, tmp_path):
    return job_of_unequal_rows(new_job, tmp_path)


WAYS = {
    "one by one": {"micro_batch_size": 1, "accumulate_grad_batches": 4},
    "two by two": {"micro_batch_size": 2, "accumulate_grad_batches": 2},
    "released": {"micro_batch_size": 4, "gradient_release": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_micro_batches_of_unequal_rows_change_nothing(way, unequal):
    whole = trained(unequal, micro_batch_size=BATCH)
    found = trained(unequal, **WAYS[way])
    for name, weights in whole.items():
        torch.testing.assert_close(found[name], weights, atol=1e-6, rtol=0, msg=name)

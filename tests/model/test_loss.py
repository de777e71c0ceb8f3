import pytest
import torch
from torch import nn

from foam_lightning.memory.tracker import StorageTracker
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


@pytest.mark.parametrize(("scale", "is_exact"), [(1.0, False), (2.0**16, True)])
def test_chunks_form_float16_gradients_at_the_scale_of_the_scaler(scale, is_exact):
    hidden, head, labels = example(rows=4, length=512)
    head.weight.data = torch.randn(20000, H) / 8  # probabilities near 1/20000 over 2048 tokens
    (expected,) = torch.autograd.grad(token_loss(hidden, head, labels)[0], head.weight)
    with torch.autocast("cpu", dtype=torch.float16):
        total, _ = token_loss(hidden, head, labels, chunked=True, scale=torch.tensor(scale))
    (found,) = torch.autograd.grad(total * scale, head.weight)
    never = slice(V, None)  # no label: nothing but small probabilities
    difference = (found[never] / scale - expected[never]).norm() / expected[never].norm()
    assert difference < 0.01 if is_exact else difference > 0.9


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


def gradients(dtype, chunked, *, divisor=1, autocast=False, **frozen):
    """Return the loss and the gradients of hidden states and head, None where one is frozen."""
    torch.manual_seed(1)
    hidden, head, labels = example(dtype=dtype)
    hidden.requires_grad_(frozen.get("hidden", True))
    head.weight.requires_grad_(frozen.get("head", True))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        total, count = token_loss(hidden, head, labels, chunked=chunked)
        (total / count / divisor).backward()
    return total.detach(), hidden.grad, head.weight.grad


@pytest.mark.parametrize("frozen", [{}, {"head": False}, {"hidden": False}], ids=str)
def test_what_is_frozen_gets_no_gradient_and_the_rest_stays_the_same(frozen):
    for plain, chunked in zip(
        *(gradients(torch.float32, on, **frozen) for on in (False, True)), strict=True
    ):
        assert (plain is None) == (chunked is None)
        if plain is not None:
            torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("divisor", [1, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_chunks_are_as_near_to_float32_as_one_product(autocast, divisor):
    dtype = torch.float32 if autocast else torch.bfloat16
    exact = gradients(torch.float32, False, divisor=divisor)
    plain = gradients(dtype, False, divisor=divisor, autocast=autocast)
    chunked = gradients(dtype, True, divisor=divisor, autocast=autocast)
    for right, one, several in zip(exact, plain, chunked, strict=True):
        assert several.dtype == one.dtype
        scale = float(right.norm())
        error_of_one, error = (float((x.float() - right).norm()) / scale for x in (one, several))
        assert error < max(1e-5, 2 * error_of_one + (divisor == 3) * 2**-9)


def test_a_tied_head_gets_the_gradient_of_both_uses():
    found = []
    for chunked in (False, True):
        torch.manual_seed(2)
        table, head = nn.Embedding(V, H), nn.Linear(H, V, bias=False)
        head.weight = table.weight
        ids = torch.randint(0, V, (3, 200))
        token_loss(table(ids).tanh(), head, ids, chunked=chunked)[0].backward()
        found.append(table.weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_gradients_are_returned_once_and_have_no_gradient_themselves():
    hidden, head, labels = example()
    total, _ = token_loss(hidden, head, labels, chunked=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(total, hidden, create_graph=True)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        total.backward()


def track(rows=3, length=200, *, head_is_trained=True, grad=True):
    """Track the chunked loss: the shape of every tensor it makes, and the most bytes alive."""
    hidden, head, labels = example(rows, length)
    head.requires_grad_(head_is_trained)
    tracker = StorageTracker(with_origins=True)
    tracker.claim([hidden, head.weight, labels], "weights")
    with torch.set_grad_enabled(grad), tracker:
        total, _ = token_loss(hidden, head, labels, chunked=True)
        if grad:
            total.backward()
    return [origin.shape for origin in tracker.record.origins], tracker.peak().terms["activations"]


def test_the_head_has_one_gradient():
    shapes, peak = track()
    assert shapes.count((V, H)) == 2  # and the head itself
    # With it: the gradient of the hidden states, a chunk's logits twice, and a little of (N,).
    assert peak < 4 * (H * V + 600 * H + 2 * 256 * V) + 20 * 600


@pytest.mark.parametrize("options", [{"head_is_trained": False}, {"grad": False}], ids=str)
def test_no_gradient_of_the_head_is_computed_where_none_is_asked_for(options):
    assert track(**options)[0].count((V, H)) == 1  # the head itself


def chunk_sizes(rows, length):
    """List the tokens of every chunk: without gradients, logits and their log-probabilities."""
    shapes, _ = track(rows, length, grad=False)
    return [shape[0] for shape in shapes if shape[1:] == (V,)][::2]


def test_chunks_have_at_least_256_tokens_and_are_at_most_64():
    assert chunk_sizes(2, 301) == [256, 256, 90]
    assert chunk_sizes(1, 64 * 300) == [300] * 64


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

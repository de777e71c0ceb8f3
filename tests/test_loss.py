import pytest
import torch
from torch import Tensor, nn

from foam_lightning.model import loss
from foam_lightning.model.loss import IGNORED, token_loss

H, V = 8, 50


def example(
    rows: int = 3, length: int = 200, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, nn.Linear, Tensor]:
    hidden = torch.randn(rows, length, H, dtype=dtype, requires_grad=True)
    head = nn.Linear(H, V, bias=False, dtype=dtype)
    labels = torch.randint(0, V, (rows, length))
    labels[0, 5:90] = IGNORED
    return hidden, head, labels


def by_hand(hidden: Tensor, head: nn.Linear, labels: Tensor) -> tuple[float, int]:
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
def test_the_loss_is_the_sum_over_scored_tokens(chunked: bool) -> None:
    hidden, head, labels = example()
    total, count = token_loss(hidden, head, labels, chunked=chunked)
    expected, expected_count = by_hand(hidden, head, labels)
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)
    assert int(count) == expected_count
    assert count.dtype == torch.int64


def test_chunks_change_neither_the_loss_nor_a_gradient() -> None:
    hidden, head, labels = example()
    found = []
    for chunked in (False, True):
        total, _ = token_loss(hidden, head, labels, chunked=chunked)
        found.append((total.detach(), *torch.autograd.grad(total, [hidden, head.weight])))
    for plain, chunked_ in zip(*found, strict=True):
        torch.testing.assert_close(chunked_, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "chunked"])
def test_ignored_labels_get_no_gradient(chunked: bool) -> None:
    hidden, head, labels = example()
    total, _ = token_loss(hidden, head, labels, chunked=chunked)
    (grad,) = torch.autograd.grad(total, hidden)
    assert not grad[0, 4:89].any()  # what these would predict is ignored
    assert not grad[:, -1].any()  # nothing follows the last position
    assert grad[0, 3].any()
    assert grad[0, 89].any()


@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "chunked"])
def test_logits_of_bfloat16_weights_are_scored_in_float32(chunked: bool) -> None:
    hidden, head, labels = example(dtype=torch.bfloat16)
    total, _ = token_loss(hidden, head, labels, chunked=chunked)
    assert total.dtype == torch.float32
    logits = head(hidden[:, :-1]).float().flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-3)


def test_at_most_64_chunks_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    cross_entropy = torch.nn.functional.cross_entropy

    def spy(logits: Tensor, *args: object, **options: object) -> Tensor:
        sizes.append(len(logits))
        return cross_entropy(logits, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("foam_lightning.model.loss.cross_entropy", spy)
    with torch.no_grad():
        token_loss(*example(2, 301), chunked=True)
        assert sizes == [256, 256, 88]
        sizes.clear()
        token_loss(*example(1, 64 * 300 + 1), chunked=True)
        assert sizes == [300] * 64


@pytest.mark.parametrize("length", [2, 3, 86, 129, 200, 256, 257, 258, 2048])
def test_fewer_rows_than_it_says_are_one_chunk(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = []
    plain = loss.checkpoint

    def counted(*args: object, **options: object) -> object:
        chunks.append(args)
        return plain(*args, **options)

    monkeypatch.setattr(loss, "checkpoint", counted)
    least = loss.least_rows_in_chunks(length)
    for rows, is_one in ((least - 1, True), (least, False)):
        if rows:
            chunks.clear()
            token_loss(*example(rows, length), chunked=True)
            assert (len(chunks) == 1) == is_one

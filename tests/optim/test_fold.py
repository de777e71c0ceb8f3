import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.optim.fold import add_unfolded_, fold, folded_shape, num_blocks, unfold
from tests.reference.foam_paper import block_means

SHAPES = [(8, 32), (8, 30), (3, 11), (1, 16), (4, 3), (5, 1), (2, 3, 10), (7,)]
LEVELS = range(13)

matrices = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31)).map(
    lambda t: torch.randn(t[0], t[1], generator=torch.Generator().manual_seed(t[2]))
)
levels = st.integers(0, 12)


def name_of(shape):
    return "x".join(map(str, shape))


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("level", LEVELS, ids="l{}".format)
def test_fold_is_the_block_mean(shape, level):
    x = torch.randn(shape, dtype=torch.float64)
    expected = [block_means(row.tolist(), level) for row in x.reshape(-1, shape[-1])]
    torch.testing.assert_close(
        fold(x, level).reshape(-1, num_blocks(shape[-1], level)),
        torch.tensor(expected, dtype=torch.float64),
    )


@given(st.integers(1, 5), st.integers(1, 40), levels)
def test_fold_undoes_unfold(rows, columns, level):
    s = torch.randn(rows, num_blocks(columns, level))
    torch.testing.assert_close(fold(unfold(s, level, columns), level), s)


@given(matrices, levels)
def test_add_unfolded_adds_in_place(x, level):
    s = torch.randn(x.shape[0], num_blocks(x.shape[-1], level))
    expected = x - 0.5 * unfold(s, level, x.shape[-1])
    assert add_unfolded_(x, s, level, alpha=-0.5) is x
    torch.testing.assert_close(x, expected)


@given(st.integers(1, 10**6), st.integers(1, 10**6), levels)
def test_folded_shape_halves_and_never_grows(rows, columns, level):
    blocks = folded_shape((rows, columns), level)[1]
    assert blocks == max(1, -(-columns // 2**level))
    assert folded_shape((rows, columns), level + 1) == (rows, -(-blocks // 2))


@pytest.mark.parametrize("shape", [(), (7,)])
def test_fewer_than_two_dimensions_are_never_folded(shape):
    assert folded_shape(torch.zeros(shape).shape, 3) == shape


def test_ragged_block_is_the_mean_of_the_columns_that_exist():
    ones = torch.ones(1, 5)
    # The released code pads to 8 columns and gets 0.25 for the last block.
    assert fold(ones, 2).tolist() == [[1.0, 1.0]]


def test_block_wider_than_the_row_is_the_row():
    x = torch.tensor([[1.0, 2.0, 6.0]])
    assert fold(x, 2).tolist() == fold(x, 12).tolist() == fold(x, 40).tolist() == [[3.0]]
    assert unfold(torch.tensor([[3.0]]), 12, 3).tolist() == [[3.0, 3.0, 3.0]]


def test_views_fold_as_their_copies_do():
    x = torch.randn(11, 6)
    for view in (x.t(), x[:, 1:], x[::2]):
        for level in (1, 2, 3):
            torch.testing.assert_close(fold(view, level), fold(view.contiguous(), level))


def test_half_precision_folds_in_float32():
    x = torch.randn(3, 11).bfloat16()
    for level in (0, 1, 2, 3, 4):
        assert fold(x, level).dtype == torch.float32
        assert torch.equal(fold(x, level), fold(x.float(), level))


def test_level_0_copies_nothing():
    x = torch.randn(2, 3)
    assert fold(x, 0) is x
    assert unfold(x, 0, 3) is x


@pytest.mark.parametrize("level", [-1, 1.5, True, "2", None])
def test_what_is_not_a_level_is_refused(level):
    with pytest.raises(ValueError, match=r"integer from 0 to 62, got "):
        fold(torch.zeros(2, 2), level)


def test_a_row_without_columns_is_refused():
    with pytest.raises(ValueError, match="got 0 columns"):
        num_blocks(0, 1)


def test_unfold_refuses_another_number_of_blocks():
    with pytest.raises(ValueError, match="10 columns at fold level 2 have 3 blocks, got 2"):
        unfold(torch.zeros(4, 2), 2, 10)

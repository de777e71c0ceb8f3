import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning import FOAM
from foam_lightning.optim.functional import orthogonal
from tests.reference.foam_paper import Settings, State
from tests.reference.variants import adam_mini_step, muon_momentum
from tests.training import all_equal, parameters, train


def trained(second_moment, shape, settings, num_steps=4):
    (param,) = parameters([shape])
    optimizer = FOAM(
        [param],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        level=settings.level,
        scale=settings.scale,
        residual_scale=settings.rho,
        second_moment=second_moment,
    )
    weights, grads = [param.detach().clone()], []
    for _ in range(num_steps):
        param.grad = torch.randn(shape)
        optimizer.step()
        grads.append(param.grad.double().tolist())
        weights.append(param.detach().clone())
    return weights, grads, optimizer.state[param]


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 7), st.floats(0, 1), st.floats(0, 0.5))
def test_one_second_moment_a_row_follows_adam_mini(rows, columns, level, rho, weight_decay):
    settings = Settings(level=level, rho=rho, weight_decay=weight_decay)
    weights, grads, kept = trained("row", (rows, columns), settings)
    expected, state = weights[0].double().tolist(), State()
    for weight, grad in zip(weights[1:], grads, strict=True):
        expected = adam_mini_step(expected, grad, state, settings)
        torch.testing.assert_close(
            weight.double(), torch.tensor(expected).double(), atol=1e-5, rtol=1e-4
        )
    assert kept["exp_avg_sq"].shape == (rows, 1)
    torch.testing.assert_close(kept["exp_avg"].double(), torch.tensor(state.m).double())


@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 6), st.floats(0, 1))
def test_muon_orthogonalises_the_unfolded_momentum(rows, columns, level, rho):
    settings = Settings(level=level, rho=rho, lr=0.1, scale=0.5, weight_decay=0.1)
    weights, grads, kept = trained("none", (rows, columns), settings)
    state = State()
    for before, after, grad in zip(weights[:-1], weights[1:], grads, strict=True):
        momentum = torch.tensor(muon_momentum(grad, state, settings), dtype=torch.float32)
        expected = (1 - 0.1 * 0.1) * before - 0.1 * 0.5 * orthogonal(momentum)
        torch.testing.assert_close(after, expected, atol=2e-4, rtol=2e-3)
    assert "exp_avg_sq" not in kept


@pytest.mark.parametrize("shape", [(20, 20), (40, 12), (12, 40)])
def test_orthogonal_brings_singular_values_near_one_and_keeps_their_vectors(shape):
    m = torch.randn(shape)
    found = orthogonal(m) / max(1.0, shape[0] / shape[1]) ** 0.5
    assert torch.linalg.svdvals(found).min() > 0.5
    assert torch.linalg.svdvals(found).max() < 1.3
    left, _, right = torch.linalg.svd(m, full_matrices=False)
    aligned = left.mT @ found @ right.mT
    torch.testing.assert_close(aligned, aligned.diagonal().diag(), atol=1e-4, rtol=0)


def test_level_0_is_torchs_muon_without_its_nesterov_step():
    ours, theirs = parameters([(16, 24)]), parameters([(16, 24)])
    options = {"lr": 0.02, "weight_decay": 0.1}
    train(FOAM(ours, level=0, scale=1.0, second_moment="none", **options), range(4))
    train(torch.optim.Muon(theirs, momentum=0.9, nesterov=False, **options), range(4))
    # torch's iteration is in bfloat16, and a step moves an entry by about lr / 4.
    torch.testing.assert_close(ours[0], theirs[0], atol=4e-4, rtol=0)


@pytest.mark.parametrize("second_moment", ["row", "none"])
def test_variants_save_and_load(second_moment):
    straight, stopped = parameters(), parameters()
    train(FOAM(straight, second_moment=second_moment), range(6))
    first = FOAM(stopped, second_moment=second_moment)
    train(first, range(3))
    second = FOAM(stopped, second_moment=second_moment)
    second.load_state_dict(first.state_dict())
    train(second, range(3, 6))
    assert all_equal(straight, stopped)

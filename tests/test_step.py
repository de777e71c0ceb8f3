import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foam_lightning.optim.fold import fold, folded_shape
from foam_lightning.optim.functional import StepFactors, foam_step_
from tests.reference import foam_paper
from tests.reference.foam_paper import Settings, State

SHAPES = [(8, 32), (8, 30), (3, 11), (1, 16), (4, 3), (2, 3, 10)]
LEVELS = range(13)
BF16, F32 = torch.bfloat16, torch.float32
DTYPES = {"f32": (F32, F32), "bf16": (BF16, BF16), "bf16-state-f32": (BF16, F32)}
# What is stored in bfloat16 may round to the neighbour, 2**-7 away: the reference computes in
# float64 and rounds the same way.
TOLERANCE = {F32: {"rtol": 1e-5, "atol": 1e-6}, BF16: {"rtol": 2**-7, "atol": 1e-6}}


class PeakBytes(TorchDispatchMode):
    """Count the bytes of the storages that appear while it is active."""

    def __init__(self, *known):
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def take_step(param, grad, exp_avg, exp_avg_sq, step, settings, step_=foam_step_, **options):
    second_moment = "mean_square" if settings.mean_square else "square_mean"
    factors = StepFactors.at(
        step,
        beta1=settings.beta1,
        beta2=settings.beta2,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        scale=settings.scale,
        residual_scale=settings.rho,
        bias_correct_moments_only=settings.correct_moments_only,
    )
    step_(
        param,
        grad,
        {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq},
        factors,
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
        level=settings.level,
        second_moment=second_moment,
        **options,
    )


def rows_of(tensor):
    return tensor.double().reshape(-1, tensor.shape[-1]).tolist()


def stored(rows, like):
    return torch.tensor(rows, dtype=torch.float64).to(like.dtype).reshape(like.shape)


def assert_follows_the_paper(shape, settings, dtypes=(F32, F32), num_steps=3):
    param_dtype, state_dtype = dtypes
    param = torch.randn(shape).to(param_dtype)
    exp_avg = torch.zeros(folded_shape(shape, settings.level), dtype=state_dtype)
    exp_avg_sq = torch.zeros_like(exp_avg)
    expected, state = param.clone(), State()
    for step in range(1, num_steps + 1):
        grad = torch.randn(shape).to(param_dtype)
        take_step(param, grad, exp_avg, exp_avg_sq, step, settings)
        rows = foam_paper.step(rows_of(expected), rows_of(grad), state, settings)
        expected = stored(rows, param)
        expected_avg, expected_sq = stored(state.m, exp_avg), stored(state.v, exp_avg)
        state.m, state.v = rows_of(expected_avg), rows_of(expected_sq)
        torch.testing.assert_close(param, expected, **TOLERANCE[param_dtype])
        torch.testing.assert_close(exp_avg, expected_avg, **TOLERANCE[state_dtype])
        torch.testing.assert_close(exp_avg_sq, expected_sq, **TOLERANCE[state_dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("level", LEVELS, ids="l{}".format)
@pytest.mark.parametrize("mean_square", [True, False], ids=["mean_square", "square_mean"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_step_follows_the_paper(shape, level, mean_square, dtypes):
    settings = Settings(level=level, mean_square=mean_square, weight_decay=0.1)
    assert_follows_the_paper(shape, settings, dtypes)


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": 0.3, "weight_decay": 0.5},
        {"eps": 0.1},
        {"beta1": 0.0, "beta2": 0.0},
        {"beta2": 0.95, "scale": 1.0},
        {"rho": 0.0},
        {"rho": 0.5},
        {"correct_moments_only": True},
        {"correct_moments_only": True, "rho": 0.5, "mean_square": False},
        {"correct_moments_only": True, "level": 0},
    ],
    ids=lambda changed: "-".join(f"{key}={value}" for key, value in changed.items()),
)
def test_every_setting_follows_the_paper(changed):
    assert_follows_the_paper((5, 14), replace(Settings(), **changed), num_steps=5)


def test_scalars_and_vectors_take_the_step_of_level_0():
    for shape in ((), (7,)):
        param, grad = torch.ones(shape), torch.full(shape, 3.0)
        state = torch.zeros(shape), torch.zeros(shape)
        take_step(param, grad, *state, 1, Settings(level=0, scale=1.0, lr=0.1))
        torch.testing.assert_close(param, torch.full(shape, 0.9))


def test_eps_acts_after_bias_correction():
    # At step 1 the bias-corrected V is G * G. Before the correction, eps would weigh
    # 1 / sqrt(1 - beta2) = 32 times as much.
    param, grad = torch.zeros(1, 1), torch.ones(1, 1)
    settings = Settings(level=0, lr=1.0, scale=1.0, eps=1.0)
    take_step(param, grad, torch.zeros(1, 1), torch.zeros(1, 1), 1, settings)
    torch.testing.assert_close(param, torch.full((1, 1), -0.5))


def test_weight_decay_acts_before_the_update_and_without_scale():
    param, grad = torch.ones(1, 1), torch.ones(1, 1)
    settings = Settings(level=0, lr=0.5, scale=0.5, eps=0.0, weight_decay=0.5)
    take_step(param, grad, torch.zeros(1, 1), torch.zeros(1, 1), 1, settings)
    # (1 - 0.5 * 0.5) * 1 - 0.5 * 0.5 * 1; decay after the update would give 0.5625.
    torch.testing.assert_close(param, torch.full((1, 1), 0.5))


def test_second_moment_is_the_mean_of_squares_unless_asked():
    grad = torch.tensor([[3.0, -1.0]])
    for mean_square, expected in ((True, 5.0), (False, 1.0)):
        exp_avg_sq = torch.zeros(1, 1)
        settings = Settings(level=1, beta2=0.0, mean_square=mean_square)
        take_step(torch.zeros(1, 2), grad, torch.zeros(1, 1), exp_avg_sq, 1, settings)
        assert exp_avg_sq.item() == expected


@pytest.mark.parametrize("moments_only", [False, True])
def test_residual_is_damped_unless_moments_only_are_corrected(moments_only):
    # One block whose mean is zero: only the residual acts.
    param, grad = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    settings = Settings(
        level=1,
        lr=1.0,
        scale=1.0,
        eps=0.0,
        beta1=0.9,
        beta2=0.999,
        correct_moments_only=moments_only,
    )
    take_step(param, grad, torch.zeros(1, 1), torch.zeros(1, 1), 1, settings)
    # M = E / 0.1 over sqrt((0.001 + 1) / 0.001), against E over sqrt(1 + 1).
    torch.testing.assert_close(param, -grad / 2**0.5 if moments_only else -grad * 10 / 1001**0.5)


def test_moments_of_any_level_are_the_folded_moments_of_adam():
    grads = [torch.randn(5, 30) for _ in range(6)]

    def moments_at(level):
        exp_avg = torch.zeros(folded_shape((5, 30), level))
        exp_avg_sq = torch.zeros_like(exp_avg)
        for step, grad in enumerate(grads, start=1):
            settings = Settings(level=level)
            take_step(torch.zeros(5, 30), grad, exp_avg, exp_avg_sq, step, settings)
        return exp_avg, exp_avg_sq

    adam = moments_at(0)
    for level in range(1, 7):
        folded = tuple(fold(moment, level) for moment in adam)
        torch.testing.assert_close(moments_at(level), folded)


@given(st.permutations(range(6)), st.integers(0, 6))
def test_rows_do_not_see_each_other(order, level):
    param, grad = torch.randn(6, 11), torch.randn(6, 11)
    shape = folded_shape((6, 11), level)
    permuted = param[order]
    take_step(
        permuted, grad[order], torch.zeros(shape), torch.zeros(shape), 1, Settings(level=level)
    )
    take_step(param, grad, torch.zeros(shape), torch.zeros(shape), 1, Settings(level=level))
    torch.testing.assert_close(permuted, param[order])


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("level", [0, 1, 3])
def test_gradient_is_left_as_it_is(dtypes, level):
    param = torch.randn(3, 11).to(dtypes[0])
    grad = torch.randn_like(param)
    kept = grad.clone()
    state = [torch.zeros(folded_shape((3, 11), level), dtype=dtypes[1]) for _ in range(2)]
    take_step(param, grad, *state, 1, Settings(level=level))
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("level", [0, 1, 3])
def test_step_traces_without_data(dtypes, level):
    with FakeTensorMode():
        param = torch.zeros(3, 11, dtype=dtypes[0])
        state = [torch.zeros(folded_shape((3, 11), level), dtype=dtypes[1]) for _ in range(2)]
        take_step(param, torch.zeros_like(param), *state, 1, Settings(level=level))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("level", [0, 1, 2, 3, 8])
def test_temporaries_are_few(dtypes, level):
    param_dtype, state_dtype = dtypes
    param = torch.zeros(8, 256, dtype=param_dtype)
    grad = torch.zeros_like(param)
    state = [torch.zeros(folded_shape((8, 256), level), dtype=state_dtype) for _ in range(2)]
    with PeakBytes(param, grad, *state) as measured:
        take_step(param, grad, *state, 1, Settings(level=level))
    num_matrices = 2 if param_dtype == F32 else 3
    num_moments = 1 if state_dtype == F32 else 3
    allowed = num_matrices * param.numel() + num_moments * state[0].numel()
    assert 0 < measured.peak <= allowed * F32.itemsize

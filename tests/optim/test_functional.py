import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foam_lightning.optim.fold import folded_shape
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


def take_step(param, grad, exp_avg, exp_avg_sq, step, settings, step_=foam_step_):
    factors = StepFactors.at_step(
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
        second_moment="mean_square" if settings.mean_square else "square_mean",
    )


def zeros(shape, level, dtype=F32):
    """Make the two moments before the first step."""
    return [torch.zeros(folded_shape(shape, level), dtype=dtype) for _ in range(2)]


def rows_of(tensor):
    return tensor.double().reshape(-1, tensor.shape[-1]).tolist()


def stored(rows, like):
    return torch.tensor(rows, dtype=torch.float64).to(like.dtype).reshape(like.shape)


def assert_follows_the_paper(shape, settings, dtypes=(F32, F32), num_steps=3, step_=foam_step_):
    param_dtype, state_dtype = dtypes
    param = torch.randn(shape).to(param_dtype)
    exp_avg, exp_avg_sq = zeros(shape, settings.level, state_dtype)
    expected, state = param.clone(), State()
    for step in range(1, num_steps + 1):
        grad = torch.randn(shape).to(param_dtype)
        take_step(param, grad, exp_avg, exp_avg_sq, step, settings, step_)
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


@pytest.mark.parametrize(
    ("weight", "grad", "settings", "expected"),
    [
        # eps acts after bias correction: at step 1 the corrected V is G * G, and eps would
        # otherwise weigh 1 / sqrt(1 - beta2) = 32 times as much.
        ([[0.0]], [[1.0]], {"level": 0, "lr": 1.0, "eps": 1.0}, [[-0.5]]),
        # Decay acts before the update and without scale: (1 - 0.5 * 0.5) - 0.5 * 0.5; after the
        # update it would give 0.5625.
        ([[1.0]], [[1.0]], {"level": 0, "lr": 0.5, "scale": 0.5, "weight_decay": 0.5}, [[0.5]]),
        # A block with mean 0, so only the residual acts: damped, E / 0.1 over
        # sqrt((0.001 + 1) / 0.001), unless only the moments are corrected, E over sqrt(1 + 1).
        ([[0.0, 0.0]], [[1.0, -1.0]], {"level": 1, "lr": 1.0}, [[-0.31607, 0.31607]]),
        (
            [[0.0, 0.0]],
            [[1.0, -1.0]],
            {"level": 1, "lr": 1.0, "correct_moments_only": True},
            [[-0.70711, 0.70711]],
        ),
    ],
)
def test_departures_from_the_released_code(weight, grad, settings, expected):
    param, grad = torch.tensor(weight), torch.tensor(grad)
    settings = Settings(**{"eps": 0.0, "scale": 1.0, **settings})
    take_step(param, grad, *zeros(param.shape, settings.level), 1, settings)
    torch.testing.assert_close(param, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("level", [0, 1, 2, 3, 8])
def test_temporaries_are_few_and_the_gradient_does_not_change(dtypes, level):
    param_dtype, state_dtype = dtypes
    param = torch.zeros(8, 256, dtype=param_dtype)
    grad = torch.randn(8, 256).to(param_dtype)
    before = grad.clone()
    state = zeros((8, 256), level, state_dtype)
    with PeakBytes(param, grad, *state) as measured:
        take_step(param, grad, *state, 1, Settings(level=level))
    num_matrices = 2 if param_dtype == F32 else 3
    num_moments = 1 if state_dtype == F32 else 3
    allowed = num_matrices * param.numel() + num_moments * state[0].numel()
    assert 0 < measured.peak <= allowed * F32.itemsize
    assert torch.equal(grad, before)

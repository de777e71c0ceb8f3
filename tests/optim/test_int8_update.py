"""FOAM on weights in int8."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foam_lightning.model.int8_weights import Int8Weight, dequantize, quantize
from foam_lightning.optim import dispatch
from foam_lightning.optim.foam import FOAM
from foam_lightning.optim.gradient_release import release_gradients
from foam_lightning.optim.state import STATE_DTYPES

SHAPE = (12, 300)


def new_parameter(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(Int8Weight(*quantize(torch.randn(SHAPE)), dtype))


def stored(parameter: Tensor) -> Int8Weight:
    found = parameter.detach()
    assert isinstance(found, Int8Weight)
    return found


def train(parameter: nn.Parameter, steps: int = 3, **options: Any) -> FOAM:
    optimizer = FOAM([parameter], **{"lr": 0.05, **options})
    for step in range(steps):
        torch.manual_seed(step)
        parameter.grad = torch.randn(SHAPE).to(parameter.dtype)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("level", [0, 2, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_an_update_is_that_of_the_float64_weights_rounded_once(
    level: int, dtype: torch.dtype, clip_norm: float | None
) -> None:
    parameter = new_parameter(dtype)
    before = stored(parameter)
    exact = nn.Parameter(dequantize(before.codes, before.scales, torch.float64))
    options = {"level": level, "clip_norm": clip_norm, "weight_decay": 0.1}
    train(parameter, 1, stochastic_rounding=False, **options)
    gradient = torch.manual_seed(0) and torch.randn(SHAPE).to(dtype)
    optimizer = FOAM([exact], lr=0.05, **options)
    exact.grad = gradient.double()
    optimizer.step()
    after = stored(parameter)
    error = (dequantize(after.codes, after.scales, torch.float64) - exact.detach()).abs()
    steps = after.scales.double().repeat_interleave(128, dim=1)[:, : SHAPE[1]]
    assert bool((error <= 0.51 * steps).all())
    assert not torch.equal(after.codes, quantize(torch.zeros(SHAPE))[0])


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_parts_of_a_matrix_are_updated_as_the_whole(
    state_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for elements in (2**20, 900):
        torch.manual_seed(7)
        monkeypatch.setattr(dispatch, "_PART_ELEMENTS", elements)
        parameter = new_parameter(torch.bfloat16)
        optimizer = train(parameter, level=1, state_dtype=state_dtype)
        weight = stored(parameter)
        found.append([weight.codes, weight.scales, *optimizer.state[parameter].values()][:6])
    for one, other in zip(*found, strict=True):
        assert one == other if isinstance(one, int) else torch.equal(one, other)


def test_updates_far_below_one_code_are_kept_on_average() -> None:
    parameter = new_parameter()
    before = stored(parameter).dequantized()
    step = stored(parameter).scales.float().repeat_interleave(128, dim=1)[:, : SHAPE[1]]
    optimizer = FOAM([parameter], lr=float(step.mean()) / 100, level=0, scale=1.0, eps=0.0)
    for _ in range(100):
        parameter.grad = torch.ones(SHAPE)
        optimizer.step()
    moved = (stored(parameter).dequantized() - before) / step.mean()
    assert float(moved.mean()) == pytest.approx(-1.0, abs=0.1)
    nearest = new_parameter()
    before, scales = stored(nearest).codes.clone(), stored(nearest).scales.clone()
    optimizer = FOAM([nearest], lr=float(step.mean()) / 100, stochastic_rounding=False)
    nearest.grad = torch.ones(SHAPE)
    optimizer.step()
    assert torch.equal(stored(nearest).codes, before)
    assert torch.equal(stored(nearest).scales, scales)


def test_a_step_of_size_zero_changes_no_code() -> None:
    parameter = new_parameter()
    before = [tensor.clone() for tensor in (stored(parameter).codes, stored(parameter).scales)]
    train(parameter, lr=0.0)
    assert torch.equal(stored(parameter).codes, before[0])
    assert torch.equal(stored(parameter).scales, before[1])


def test_released_and_plain_steps_are_equal_and_so_is_a_loaded_state() -> None:
    found = []
    for released in (True, False):
        torch.manual_seed(3)
        parameter = new_parameter()
        optimizer = FOAM([parameter], level=1, state_dtype=torch.int8)
        for step in range(4):
            if step == 2:
                saved = optimizer.state_dict()
                optimizer = FOAM([parameter], level=1, state_dtype=torch.int8)
                optimizer.load_state_dict(saved)
            torch.manual_seed(step)
            loss = (parameter * torch.randn(SHAPE)).sum()
            if released:
                with release_gradients(optimizer):
                    loss.backward()
                assert parameter.grad is None
            else:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(stored(parameter))
    assert torch.equal(found[0].codes, found[1].codes)
    assert torch.equal(found[0].scales, found[1].scales)

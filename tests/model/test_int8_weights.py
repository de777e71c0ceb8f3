"""Weights in int8: the arithmetic, the layer, and the model of a folder."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear

from foam_lightning.model.int8_weights import (
    Int8Linear,
    Int8Weight,
    dequantize,
    is_int8,
    plain_state,
    quantize,
    use_int8_weights,
    weight_layout,
)
from foam_lightning.optim import rounding

COLUMNS = (1, 5, 128, 129, 300, 384)


def round_up(number: float) -> float:
    found = torch.tensor(number, dtype=torch.float32).bfloat16()
    if float(found) < number:
        found = torch.nextafter(found, torch.tensor(torch.inf).bfloat16())
    return float(found)


def reference(weights: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize to the nearest code in float64, one group after the other."""
    codes, scales = torch.zeros_like(weights, dtype=torch.int8), []
    for row in range(len(weights)):
        for number, start in enumerate(range(0, weights.shape[1], 128)):
            group = weights[row, start : start + 128].double()
            largest = float(group.abs().max())
            scale = round_up(largest / 127 * (1 + 1 / 32))
            before = 0.0 if kept is None else float(kept[row, number])
            if before and 0.75 * before <= round_up(largest / 127) <= before:
                scale = before
            scales.append(scale)
            if scale:
                codes[row, start : start + 128] = (group / scale).round()
    return codes, torch.tensor(scales).bfloat16().view(len(weights), -1)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("size", [1e-30, 0.02, 1e4])
def test_quantizing_agrees_with_the_definition(columns: int, size: float) -> None:
    weights = torch.randn(6, columns) * size
    weights[2] = 0
    codes, scales = quantize(weights)
    expected_codes, expected_scales = reference(weights)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    assert torch.equal(scales, expected_scales)
    # A float32 quotient may lie on the other side of a half.
    assert int((codes.int() - expected_codes.int()).abs().max()) <= 1
    assert float((codes != expected_codes).float().mean()) < 0.01
    error = (dequantize(codes, scales, torch.float64) - weights.double()).abs()
    steps = scales.double().repeat_interleave(128, dim=1)[:, :columns]
    assert bool((error <= 0.5001 * steps).all())


@given(
    seed=st.integers(0, 2**31 - 1),
    columns=st.sampled_from(COLUMNS),
    change=st.floats(0, 0.5),
)
def test_a_scale_stays_while_its_group_fits_and_no_code_is_cut_off(
    seed: int, columns: int, change: float
) -> None:
    torch.manual_seed(seed)
    codes, scales = quantize(torch.randn(3, columns))
    weights = dequantize(codes, scales, torch.float32)
    round_codes = partial(rounding.to_integer, seed=seed - 2**30)
    same_codes, same_scales = quantize(weights, scales, round_codes)
    assert torch.equal(same_scales, scales)
    assert torch.equal(same_codes, codes)  # what no update changed, no rounding changes
    changed = weights * (1 + change * torch.randn(3, columns))
    _, new_scales = quantize(changed, scales, round_codes)
    assert torch.equal(new_scales, reference(changed, scales)[1])


def test_rounding_at_random_keeps_the_mean() -> None:
    weights = torch.randn(4, 256)
    _, scales = quantize(weights)
    total = torch.zeros(4, 256, dtype=torch.float64)
    for seed in range(1000):
        round_codes = partial(rounding.to_integer, seed=seed * 7919)
        total += dequantize(*quantize(weights, scales, round_codes), torch.float64)
    error = (total / 1000 - weights).abs() / scales.double().repeat_interleave(128, dim=1)
    assert float(error.max()) < 0.08  # 5 standard deviations of the mean


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_weight_that_is_not_finite_spoils_its_own_group_only(bad: float) -> None:
    weights = torch.randn(2, 256)
    weights[0, 3] = bad
    found = dequantize(*quantize(weights), torch.float32)
    assert not found[0, 3].isfinite()
    assert bool(found[0, 128:].isfinite().all() and found[1].isfinite().all())


# ---- the layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_layer_is_linear_in_the_dequantized_matrix(dtype: torch.dtype, has_bias: bool) -> None:
    layer = Int8Linear(nn.Linear(300, 24, bias=has_bias, dtype=dtype))
    matrix = layer.weight.detach().dequantized().requires_grad_()
    x = torch.randn(2, 3, 300, dtype=dtype, requires_grad=True)
    x_of_reference = x.detach().clone().requires_grad_()
    expected = linear(x_of_reference, matrix, layer.bias)
    found = layer(x)
    gradient = torch.randn_like(found)
    found.backward(gradient)
    expected.backward(gradient)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(x.grad, x_of_reference.grad)
    torch.testing.assert_close(layer.weight.grad, matrix.grad)
    assert type(layer.weight.grad) is Tensor


def test_under_autocast_the_gradient_has_the_dtype_of_the_run() -> None:
    layer, x = Int8Linear(nn.Linear(64, 8, bias=False)), torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert (y.dtype, layer.weight.grad.dtype, x.grad.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )


def test_backward_keeps_no_matrix() -> None:
    layer, kept = Int8Linear(nn.Linear(256, 512, bias=False)), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(2, 256))
    floats = [t.numel() for t in kept if t.dtype == torch.float32]
    assert floats == [2 * 256]


def test_the_weight_is_a_matrix_to_read_and_refuses_to_be_changed() -> None:
    layer = Int8Linear(nn.Linear(256, 16))
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.shape == (16, 256)
    torch.testing.assert_close(layer.weight.detach() * 2, layer.weight.detach().dequantized() * 2)
    with pytest.raises(NotImplementedError, match="int8"), torch.no_grad():
        layer.weight.zero_()


def test_a_cast_changes_the_dtype_of_the_run_and_no_code() -> None:
    layer = Int8Linear(nn.Linear(256, 16))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weight = layer.weight
    assert layer.to("cpu").weight is weight
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.weight.scales.dtype == torch.bfloat16
    assert torch.equal(layer.state_dict()["weight_codes"], before["weight_codes"])
    assert torch.equal(layer.state_dict()["weight_scales"], before["weight_scales"])


def test_a_state_is_loaded_whole_or_refused() -> None:
    one, other = (Int8Linear(nn.Linear(256, 16)) for _ in range(2))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.weight.detach().dequantized(), other.weight.detach().dequantized())
    for wrong in (
        nn.Linear(256, 16).state_dict(),
        Int8Linear(nn.Linear(256, 8)).state_dict(),
        {**one.state_dict(), "more": torch.zeros(1)},
    ):
        with pytest.raises(RuntimeError, match=r"weight_codes|more"):
            other.load_state_dict(wrong)


# ---- the model


def test_matrices_of_the_layers_are_int8_and_nothing_else() -> None:
    assert is_int8("model.layers.3.mlp.up_proj.weight", (8, 4), "int8")
    for name, shape, dtype in [
        ("model.layers.3.mlp.up_proj.weight", (8, 4), None),
        ("model.layers.3.self_attn.q_proj.bias", (8,), "int8"),
        ("model.embed_tokens.weight", (8, 4), "int8"),
        ("lm_head.weight", (8, 4), "int8"),
        ("model.norm.weight", (8,), "int8"),
    ]:
        assert not is_int8(name, shape, dtype)


@pytest.mark.parametrize("family", ["llama-3.1", "qwen2"])
def test_what_is_stored_is_what_the_account_counts(family: str, tmp_path: Path) -> None:
    from foam_lightning.model.pretrained import load_pretrained
    from tests.support.pretrained import save_pretrained

    model = load_pretrained(str(save_pretrained(tmp_path, family)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_int8_weights(model)
    for name, parameter in model.named_parameters():
        stored = (
            [parameter.codes, parameter.scales]
            if isinstance(parameter, Int8Weight)
            else [parameter]
        )
        layout = weight_layout(name, parameter.shape, parameter.dtype, "int8")
        assert [(tuple(tensor.shape), tensor.dtype) for tensor in stored] == layout
    after = plain_state(model)
    assert after.keys() == before.keys()
    assert all(after[name].dtype == before[name].dtype for name in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if is_int8(name, before[name].shape, "int8")}

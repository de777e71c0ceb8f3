import copy
import math

import pytest
import torch
from torch import nn

from foam_lightning import FOAM
from tests.support.training import all_equal, moments, parameters, train

BF16, F32, F64, INT8 = torch.bfloat16, torch.float32, torch.float64, torch.int8


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"betas": (0.8, 0.95), "eps": 1e-3}], ids=str
)
@pytest.mark.parametrize("second_moment", ["mean_square", "square_mean"])
@pytest.mark.parametrize(
    ("dtype", "fused"), [(F32, False), (F64, False), (F64, None)], ids=["f32", "f64", "f64-default"]
)
def test_level_0_with_scale_1_is_adamw_to_the_last_bit(options, second_moment, dtype, fused):
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    options = {"weight_decay": 0.0, "lr": 1e-2, **options}
    train(
        FOAM(ours, level=0, scale=1, fused=fused, second_moment=second_moment, **options), range(6)
    )
    train(torch.optim.AdamW(theirs, foreach=False, **options), range(6))
    assert all_equal(ours, theirs)


def test_the_default_update_at_level_0_is_adamw_up_to_the_last_bits():
    """torch takes roots by MKL, which rounds some otherwise than the compiled kernel does."""
    ours, theirs = parameters([(64, 64)]), parameters([(64, 64)])
    train(FOAM(ours, level=0, scale=1, lr=1e-2), range(10))
    train(torch.optim.AdamW(theirs, weight_decay=0, lr=1e-2), range(10))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("state_dtype", [F32, BF16, INT8], ids=["f32", "bf16", "int8"])
@pytest.mark.parametrize("level", [0, 1, 3, 12])
def test_float64_weights_are_updated_in_float64(level, state_dtype):
    double, single = parameters(dtype=F64), parameters()
    for options in ({}, {"clip_norm": 0.5, "residual_scale": 0.5, "second_moment": "square_mean"}):
        optimizers = [
            FOAM(params, level=level, state_dtype=state_dtype, **options)
            for params in (double, single)
        ]
        for optimizer in optimizers:
            train(optimizer, range(4))
        if state_dtype == F32:
            assert {moment.dtype for moment in moments(optimizers[0])} == {F64}
            rounded = [(p - p.float()).abs().max() > 0 for p in double]
            assert all(rounded)
    for a, b in zip(double, single, strict=True):
        rtol = 1e-2 if state_dtype == INT8 else 1e-4
        torch.testing.assert_close(a.float(), b, rtol=rtol, atol=2e-5)


@pytest.mark.parametrize("level", [0, 1, 3, 12])
def test_fused_equals_plain_up_to_the_last_bits(level):
    fused, plain = parameters(), parameters()
    train(FOAM(fused, level=level, weight_decay=0.1), range(6))
    train(FOAM(plain, level=level, weight_decay=0.1, fused=False), range(6))
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(), (7,)], ids=["scalar", "vector"])
def test_fewer_than_two_dimensions_neither_fold_nor_scale(shape):
    ours, theirs = parameters([shape]), parameters([shape])
    train(FOAM(ours, level=3, scale=0.1), range(3))
    train(torch.optim.AdamW(theirs, weight_decay=0, foreach=False), range(3))
    assert all_equal(ours, theirs)


def test_groups_may_override_every_option():
    options = [
        {"level": 0, "scale": 1.0, "weight_decay": 0.1},
        {"level": 1, "lr": 0.1, "betas": (0.5, 0.6), "eps": 1e-3, "state_dtype": BF16},
        {"level": 3, "residual_scale": 0.5, "second_moment": "square_mean"},
        {"level": 3, "bias_correct_moments_only": True},
    ]
    together, alone = parameters([(4, 12)] * 4), parameters([(4, 12)] * 4)
    train(FOAM([{"params": [p], **o} for p, o in zip(together, options, strict=True)]), range(4))
    # Each alone sees the gradients it saw together: the same draws in the same order.
    separate = [FOAM([p], **o) for p, o in zip(alone, options, strict=True)]
    for step in range(4):
        random = torch.Generator().manual_seed(step)
        for param, optimizer in zip(alone, separate, strict=True):
            param.grad = torch.randn(param.shape, generator=random)
            optimizer.step()
    assert all_equal(together, alone)


def test_parameters_without_a_gradient_do_not_change_and_have_no_state():
    still, moved = parameters([(3, 8), (3, 8)])
    before = still.detach().clone()
    optimizer = FOAM([still, moved], weight_decay=0.1)
    moved.grad = torch.ones_like(moved)
    optimizer.step()
    assert torch.equal(still, before)
    assert list(optimizer.state) == [moved]


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    (param,) = parameters([(3, 8)])
    optimizer = FOAM([param])

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)


@pytest.mark.parametrize("state_offload", [False, True])
def test_a_deep_copy_has_its_own_state(state_offload):
    original = FOAM(parameters(), state_offload=state_offload)
    train(original, range(2))
    duplicate = copy.deepcopy(original)
    assert {type(s) for s in duplicate.state.values()} == {type(s) for s in original.state.values()}
    train(duplicate, [2])
    assert {state["step"] for state in original.state.values()} == {2}
    assert not all_equal(moments(original), moments(duplicate))
    train(original, [2])
    assert all_equal(moments(original), moments(duplicate))


@pytest.mark.parametrize("state_dtype", [F32, BF16, INT8], ids=["f32", "bf16", "int8"])
@pytest.mark.parametrize("level", [0, 2])
def test_stochastic_rounding_repeats_and_does_not_use_the_global_generator(state_dtype, level):
    first, second = parameters(dtype=BF16), parameters(dtype=BF16)
    before = torch.get_rng_state()
    train(FOAM(first, level=level, state_dtype=state_dtype), range(5))
    assert torch.equal(before, torch.get_rng_state())
    train(FOAM(second, level=level, state_dtype=state_dtype), range(5))
    assert all_equal(first, second)


def test_small_updates_of_bfloat16_weights_add_up_only_if_rounded_stochastically():
    def mean_after(**options):
        (param,) = parameters([(64, 64)], BF16)
        param.data.fill_(1.0)
        optimizer = FOAM([param], lr=1e-4, scale=1.0, level=0, **options)
        for _ in range(100):
            param.grad = torch.ones_like(param)
            optimizer.step()
        return param.float().mean().item()

    # 100 steps of -1e-4, each below half a unit of the last place of 1.0 (1/512).
    assert mean_after(stochastic_rounding=False) == 1.0
    assert mean_after() == pytest.approx(0.99, abs=5e-4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("level", [0, 1, 3])
def test_what_is_not_finite_stays_in_its_block(level, value, fused):
    clean, broken = parameters([(4, 24)]), parameters([(4, 24)])
    for params, entry in ((clean, 0.5), (broken, value)):
        grad = torch.ones(4, 24)
        grad[2, 9] = entry
        params[0].grad = grad
        FOAM(params, level=level, fused=fused).step()
    block = slice(9 // 2**level * 2**level, (9 // 2**level + 1) * 2**level)
    assert not broken[0][2, block].isfinite().any()
    broken[0].data[2, block] = clean[0].data[2, block]
    assert all_equal(clean, broken)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("level", [0, 1, 3])
def test_strides_do_not_matter(level, fused):
    plain = parameters([(6, 20)])
    strided = [nn.Parameter(plain[0].detach().t().contiguous().t())]
    assert not strided[0].is_contiguous()
    for params in (plain, strided):
        params[0].grad = torch.arange(120.0).view(20, 6).t().sin()
        optimizer = FOAM(params, level=level, fused=fused)
        for _ in range(3):
            optimizer.step()
    torch.testing.assert_close(plain[0], strided[0])


@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0)])
def test_an_empty_parameter_is_skipped(shape):
    param = nn.Parameter(torch.zeros(shape))
    param.grad = torch.zeros(shape)
    FOAM([param], level=2).step()
    assert param.shape == shape


@pytest.mark.parametrize("clip_norm", [0.5, 1e3])
def test_each_gradient_is_clipped_by_its_own_norm(clip_norm):
    clipped, scaled = parameters(), parameters()
    optimizers = FOAM(clipped, clip_norm=clip_norm), FOAM(scaled)
    for step in range(3):
        random = torch.Generator().manual_seed(step)
        for a, b in zip(clipped, scaled, strict=True):
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad * min(1.0, clip_norm / a.grad.norm().item())
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(clipped, scaled, strict=True):
        torch.testing.assert_close(a, b)


def test_complex_and_sparse_gradients_are_refused():
    param = nn.Parameter(torch.zeros(2, 4, dtype=torch.complex64))
    param.grad = torch.zeros_like(param)
    with pytest.raises(RuntimeError, match=r"complex .* \(2, 4\)"):
        FOAM([param]).step()
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse .* \(10, 4\)"):
        FOAM(embedding.parameters()).step()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("lr", -1.0), ("lr", math.nan), ("eps", -1e-8), ("weight_decay", -0.1)],
        *[
            ("scale", -0.25),
            ("residual_scale", math.inf),
            ("betas", (0.9, 1.0)),
            ("clip_norm", 0.0),
        ],
        *[("level", -1), ("level", 1.5), ("level", 10**9), ("level", True)],
        *[("second_moment", "max"), ("second_moment", "row"), ("state_dtype", torch.float16)],
    ],
)
def test_options_out_of_range_are_refused_by_name_and_value(name, value):
    for groups, options in (
        (parameters(), {name: value}),
        ([{"params": parameters(), name: value}], {}),
    ):
        with pytest.raises(ValueError, match=name) as caught:
            FOAM(groups, **options)
        assert str(value) in str(caught.value)

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.model.roles import ROLES, role_of
from foam_lightning.plan import FoldPlan, MemoryOptions
from tuner.planning.scales import (
    combine_plans,
    describe_scales,
    round_to_three_digits,
    scale_plan,
    scale_rows,
)

NAMES = [
    f"model.layers.{layer}.{'self_attn' if role in 'qkvo' else 'mlp'}.{role}_proj.weight"
    for layer in range(2)
    for role in ROLES
]
QK = [name for name in NAMES if role_of(name) in ("q", "k")]
FACTORS = st.floats(0.2, 5.0)
THREE_DIGITS = 5.1e-3


def plan_of(levels: dict[str, int], scales: dict[str, float], lr: float = 0.02) -> FoldPlan:
    return FoldPlan(
        model={},
        levels=levels,
        scales=scales,
        lr=lr,
        memory_options=MemoryOptions(micro_batch_size=1),
    )


def uniform(level: int, scale: float, lr: float = 0.02) -> FoldPlan:
    return plan_of(dict.fromkeys(NAMES, level), dict.fromkeys(NAMES, scale), lr)


@given(lr_factor=FACTORS, scale_factor=FACTORS, qk_factor=FACTORS)
def test_each_factor_multiplies_what_it_is_named_after(
    lr_factor: float, scale_factor: float, qk_factor: float
) -> None:
    plan = uniform(0, 0.1)
    found = scale_plan(plan, lr_factor=lr_factor, scale_factor=scale_factor, qk_factor=qk_factor)
    assert (found.levels, found.memory_options) == (plan.levels, plan.memory_options)
    assert found.lr == pytest.approx(0.02 * lr_factor, rel=THREE_DIGITS)
    for name, scale in found.scales.items():
        factor = scale_factor * (qk_factor if name in QK else 1.0)
        assert scale == pytest.approx(0.1 * factor, rel=THREE_DIGITS)
    assert list(found.scales) == NAMES
    assert scale_plan(plan) == plan


@given(
    levels=st.lists(st.integers(0, 3), min_size=len(NAMES), max_size=len(NAMES)),
    rates=st.tuples(st.floats(0.005, 0.1), st.floats(0.005, 0.1)),
    qk_factors=st.tuples(FACTORS, FACTORS),
)
def test_in_a_mixed_plan_the_steps_of_every_matrix_keep_their_size(
    levels: list[int], rates: tuple[float, float], qk_factors: tuple[float, float]
) -> None:
    adam = scale_plan(uniform(0, 0.1, rates[0]), qk_factor=qk_factors[0])
    folded = scale_plan(uniform(2, 0.25, rates[1]), qk_factor=qk_factors[1])
    by_name = dict(zip(NAMES, levels, strict=True))
    plan = combine_plans(by_name, unfolded=adam, folded=folded)
    assert (plan.levels, plan.lr, plan.memory_options) == (
        by_name,
        folded.lr,
        folded.memory_options,
    )
    for name, level in by_name.items():
        if level or role_of(name) in ("q", "k"):
            assert plan.scales[name] == folded.scales[name]
        else:
            step = adam.lr * adam.scales[name]
            assert plan.lr * plan.scales[name] == pytest.approx(step, rel=THREE_DIGITS)


def test_scales_are_described_by_level_and_role() -> None:
    assert scale_rows(uniform(2, 0.25)) == []
    assert describe_scales(uniform(2, 0.25)) == "0.25"
    adam = scale_plan(uniform(0, 0.1), qk_factor=2.5)
    assert describe_scales(adam) == "0.1 (q, k: 0.25)"
    assert scale_rows(adam) == [["0", "0.25", "0.25", "0.1", "0.1", "0.1", "0.1", "0.1"]]
    levels = {name: 0 if name in QK else 3 for name in NAMES}
    mixed = combine_plans(levels, unfolded=adam, folded=scale_plan(uniform(2, 0.3), qk_factor=0.5))
    assert describe_scales(mixed) == "level 0: 0.15; level 3: 0.3"
    assert scale_rows(mixed) == [
        ["0", "0.15", "0.15", "-", "-", "-", "-", "-"],
        ["3", "-", "-", "0.3", "0.3", "0.3", "0.3", "0.3"],
    ]


def test_scales_that_differ_within_a_role_are_all_listed() -> None:
    scales = dict.fromkeys(NAMES, 0.2) | {QK[0]: 0.1, "model.layers.0.mlp.up_proj.weight": 0.3}
    plan = plan_of(dict.fromkeys(NAMES, 1), scales)
    assert describe_scales(plan) == "0.2 (q: 0.1, 0.2; up: 0.2, 0.3)"


@pytest.mark.parametrize(("value", "expected"), [(0.123456, 0.123), (98765.0, 98800.0), (2.0, 2.0)])
def test_three_digits_are_kept(value: float, expected: float) -> None:
    assert round_to_three_digits(value) == expected

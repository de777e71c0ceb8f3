import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.model.roles import ROLES, layer_of, role_of
from tuner.planning.knobs import (
    Knobs,
    base_curve,
    damage_table,
    decode,
    nearest_levels,
    state_bytes_table,
    suggest,
)

LEVELS = tuple(range(9))


def llama_shapes(num_layers: int = 4) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(num_layers):
        for role in ROLES:
            block = "self_attn" if role in "qkvo" else "mlp"
            shape = {"gate": (86, 32), "up": (86, 32), "down": (32, 86)}.get(role, (32, 32))
            shapes[f"model.layers.{layer}.{block}.{role}_proj.weight"] = shape
    return shapes


SHAPES = llama_shapes()
NAMES = list(SHAPES)


@pytest.mark.parametrize(
    ("name", "role", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "q", 3),
        ("layers.12.mlp.down_proj.weight", "down", 12),
        ("_orig_mod.model.layers.0.mlp.gate_proj.weight", "gate", 0),
        ("model.layers.3.input_layernorm.weight", "other", 3),
        ("model.embed_tokens.weight", "other", None),
        ("lm_head.weight", "other", None),
        ("model.layers.1.self_attn.qk_proj.weight", "other", 1),
        ("model.layers.1.self_attn.qkv_proj.weight", "qkv", 1),
        ("model.layers.1.mlp.gate_up_proj.weight", "gate_up", 1),
        ("q_proj", "q", None),
    ],
)
def test_role_and_layer_are_read_from_the_name(name: str, role: str, layer: int | None) -> None:
    assert role_of(name) == role
    assert layer_of(name) == layer


def test_the_base_curve_is_the_residual_of_random_groups() -> None:
    assert base_curve(0) == 0
    random = np.random.default_rng(0).normal(size=(512, 512))
    for level in (1, 2, 4, 8):
        blocks = random.reshape(512, -1, 2**level)
        residual = blocks - blocks.mean(axis=-1, keepdims=True)
        measured = np.linalg.norm(residual) / np.linalg.norm(random)
        assert base_curve(level) == pytest.approx(measured, rel=0.01)


def test_by_default_damage_is_elements_times_the_curve() -> None:
    table = damage_table(SHAPES, Knobs(), LEVELS)
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    np.testing.assert_allclose(table, np.outer(sizes, [base_curve(level) for level in LEVELS]))


def test_a_multiplier_changes_only_its_role() -> None:
    ratio = damage_table(SHAPES, Knobs(v=3.0), [4]) / damage_table(SHAPES, Knobs(), [4])
    expected = [3.0 if role_of(name) == "v" else 1.0 for name in NAMES]
    np.testing.assert_allclose(ratio[:, 0], expected)


def test_a_matrix_of_several_roles_takes_the_multiplier_of_the_first() -> None:
    shapes = {f"layers.0.{role}_proj.weight": (8, 8) for role in ("qkv", "o", "gate_up", "down")}
    knobs = Knobs(q=2.0, k=5.0, gate=3.0, up=7.0)
    ratio = damage_table(shapes, knobs, [4]) / damage_table(shapes, Knobs(), [4])
    np.testing.assert_allclose(ratio[:, 0], [2.0, 1.0, 3.0, 1.0])


def test_depth_runs_from_the_first_layer_to_the_last() -> None:
    knobs = Knobs(depth_slope=0.5, depth_curvature=0.3)
    shapes = llama_shapes(3) | {"lm_head.weight": (8, 8)}
    ratio = damage_table(shapes, knobs, [2]) / damage_table(shapes, Knobs(), [2])
    first, middle, last = math.exp(-0.5 + 0.2), math.exp(-0.1), math.exp(0.5 + 0.2)
    np.testing.assert_allclose(ratio[:, 0], [first] * 7 + [middle] * 7 + [last] * 7 + [1.0])

    one = llama_shapes(1)
    np.testing.assert_array_equal(
        damage_table(one, Knobs(depth_slope=2.0), [1]), damage_table(one, Knobs(), [1])
    )


def test_levels_above_the_cap_may_not_be_chosen() -> None:
    table = damage_table(SHAPES, Knobs(level_cap=3), LEVELS)
    assert np.isfinite(table).all(axis=0).tolist() == [True] * 4 + [False] * 5


def test_state_bytes_count_both_moments_with_a_ragged_last_block() -> None:
    table = state_bytes_table({"w": (10, 86), "row": (3, 4)}, (0, 2, 8), "bfloat16")
    assert table.tolist() == [[3440, 880, 40], [48, 12, 12]]


@given(
    st.builds(
        Knobs,
        **dict.fromkeys((*ROLES, "exponent"), st.floats(0.125, 8)),
        depth_slope=st.floats(-2, 2),
        depth_curvature=st.floats(-2, 2),
        level_cap=st.integers(1, 8),
    ),
    st.floats(0, 1),
)
def test_any_knobs_decode_to_levels_that_fit(knobs: Knobs, fraction: float) -> None:
    cost = state_bytes_table(SHAPES, LEVELS, "bfloat16")
    low, high = int(cost[:, -1].sum()), int(cost[:, 0].sum())
    budget = low + int(fraction * (high - low))
    levels = decode(SHAPES, knobs, LEVELS, cost, budget)
    assert list(levels) == NAMES
    assert sum(int(cost[row, levels[name]]) for row, name in enumerate(NAMES)) <= budget
    with pytest.raises(ValueError, match=str(low)):
        decode(SHAPES, knobs, LEVELS, cost, low - 1)


def test_a_cap_is_raised_only_as_far_as_the_budget_needs() -> None:
    cost = state_bytes_table(SHAPES, LEVELS, "bfloat16")
    budget = int(cost[:, 3].sum())
    assert max(decode(SHAPES, Knobs(level_cap=5), LEVELS, cost, budget).values()) == 5
    assert set(decode(SHAPES, Knobs(level_cap=2), LEVELS, cost, budget).values()) == {3}


def test_a_trial_returns_the_knobs_that_were_enqueued() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    knobs = Knobs(q=0.125, down=8.0, depth_slope=-1.5, exponent=3.0, level_cap=2)
    for enqueued in (Knobs(), knobs):
        study.enqueue_trial(asdict(enqueued))
        trial = study.ask()
        assert suggest(trial) == enqueued
        assert trial.params == asdict(enqueued)
    assert suggest(study.ask()) not in (Knobs(), knobs)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"q": 0.0}, "q must be above 0"),
        ({"exponent": -1.0}, "exponent must be above 0"),
        ({"depth_slope": math.nan}, "depth_slope must be finite"),
        ({"level_cap": 0}, "level_cap .* got 0"),
        ({"level_cap": 9}, "level_cap .* got 9"),
    ],
)
def test_a_knob_out_of_range_is_named(knobs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Knobs(**knobs)  # type: ignore[arg-type]


@given(
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
    st.integers(0, 100),
)
def test_the_nearest_levels_that_fit_are_those_of_brute_force(
    levels: list[int], percent: int
) -> None:
    shapes = {name: SHAPES[name] for name in NAMES[3:7]}
    wanted = dict(zip(shapes, levels, strict=True))
    costs = state_bytes_table(shapes, (0, 1, 2), "float32")
    least, most = int(costs.min(axis=1).sum()), int(costs.max(axis=1).sum())
    budget = least + (most - least) * percent // 100

    def distance(chosen: Sequence[int]) -> int:
        return sum(
            math.prod(shape) * abs(level - wanted[name])
            for level, (name, shape) in zip(chosen, shapes.items(), strict=True)
        )

    def spent(chosen: Sequence[int]) -> int:
        return sum(int(costs[row, level]) for row, level in enumerate(chosen))

    found = list(nearest_levels(shapes, wanted, (0, 1, 2), costs, budget).values())
    assert spent(found) <= budget
    fitting = [chosen for chosen in product((0, 1, 2), repeat=4) if spent(chosen) <= budget]
    assert distance(found) == min(map(distance, fitting))

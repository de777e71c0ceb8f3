import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.scales import equal_rms, per_level, rms_by_level, rounded, scales_in_words

SIZES = st.floats(1e-6, 1e6)
SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.1.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.mlp.up_proj.weight": (16, 4),
}


@given(rms=st.lists(SIZES, min_size=1, max_size=9), target=SIZES)
def test_every_level_takes_steps_of_the_same_size(rms: list[float], target: float) -> None:
    by_level = dict(enumerate(rms))
    scales = equal_rms(by_level, target=target, rms=by_level)
    assert list(scales) == sorted(by_level)
    for level, scale in scales.items():
        assert scale * by_level[level] == pytest.approx(target, rel=5.1e-3)  # of three digits


def test_only_the_levels_in_use_get_a_scale() -> None:
    rms = {0: 0.5, 1: 0.6, 2: 0.8}
    assert equal_rms([2, 0, 2], target=0.2, rms=rms) == {0: 0.4, 2: 0.25}
    assert per_level([2, 0, 1, 2], unfolded=0.1, folded=0.25) == {0: 0.1, 1: 0.25, 2: 0.25}
    assert per_level([3], unfolded=0.1, folded=0.25) == {3: 0.25}


@given(st.tuples(SIZES, SIZES))
def test_the_rms_of_a_level_is_that_of_all_elements(sizes: tuple[float, float]) -> None:
    q, up = sizes
    found = rms_by_level({"q": {0: q, 2: 2 * q}, "up": {0: up, 2: 2 * up}}, SHAPES)
    elements = [q] * 32 + [up] * 64
    assert found[0] == pytest.approx(math.sqrt(math.fsum(x * x for x in elements) / 96))
    assert found[2] == pytest.approx(2 * found[0])


@pytest.mark.parametrize(
    "by_role",
    [
        {},
        {"q": {0: 0.5}},
        {"q": {0: 0.5}, "up": {0: math.nan}},
        {"q": {0: 0.5}, "up": {0: math.inf}},
        {"q": {0: 0.0, 1: 0.5}, "up": {0: 0.0, 1: 0.5}},
    ],
    ids=["nothing", "a role is missing", "not a number", "infinite", "no update"],
)
def test_what_no_scale_can_follow_from_is_nothing(by_role: dict[str, dict[int, float]]) -> None:
    assert rms_by_level(by_role, SHAPES) == {}


def test_the_sentence_says_which_rule_was_applied() -> None:
    assert "scales are per level" in scales_in_words("per_level", measured=True)
    assert "equalise it" in scales_in_words("equal_rms", measured=True)
    assert scales_in_words("equal_rms", measured=False) == (
        "So scales are per level, though tune.scales asks for equal_rms."
    )


@pytest.mark.parametrize(("value", "expected"), [(0.123456, 0.123), (98765.0, 98800.0), (2.0, 2.0)])
def test_three_digits_are_kept(value: float, expected: float) -> None:
    assert rounded(value) == expected

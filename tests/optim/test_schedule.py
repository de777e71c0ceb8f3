from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_wsd_schedule

from foam_lightning.optim.schedule import learning_rate_factor
from foam_lightning.settings import ScheduleName


def factor(steps, schedule, *, warmup=0.1, decay=0.2, final=0.1):
    return learning_rate_factor(
        steps,
        schedule=schedule,
        warmup_fraction=warmup,
        decay_fraction=decay,
        final_fraction=final,
    )


def factors(steps, schedule, **fractions):
    return [factor(steps, schedule, **fractions)(step) for step in range(steps)]


@pytest.mark.parametrize(
    ("steps", "warmup", "final"), [(100, 0.1, 0.1), (8, 0.25, 0.0), (7, 1.0, 0.5)]
)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_end(schedule, steps, warmup, final):
    values = factors(steps, schedule, warmup=warmup, final=final)
    peak = round(steps * warmup) - 1
    assert values[peak] == 1.0
    assert values[: peak + 1] == pytest.approx([(i + 1) / (peak + 1) for i in range(peak + 1)])
    assert all(a > b for a, b in zip(values[peak:], values[peak + 1 :], strict=False))
    if peak + 1 < steps:
        assert values[-1] == pytest.approx(final)
        middle = (peak + steps - 1) / 2
        if middle.is_integer():
            assert values[int(middle)] == pytest.approx((1 + final) / 2)


def test_half_way_down_a_cosine_falls_faster_than_a_line():
    cosine, line = factors(1000, "cosine", final=0), factors(1000, "linear", final=0)
    assert cosine[325] > line[325]
    assert cosine[775] < line[775]
    assert line[100] - line[101] == pytest.approx(line[900] - line[901])


def test_a_constant_learning_rate_stays_at_its_peak():
    assert factors(50, "constant") == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 46)


def test_wsd_is_constant_until_it_falls_along_a_line():
    values = factors(100, "wsd")
    assert values[9:80] == pytest.approx([1.0] * 71)
    assert values[80:] == pytest.approx([1 - 0.9 * (i + 1) / 20 for i in range(20)])


def test_wsd_is_that_of_transformers_one_step_later():
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    steps = {"num_warmup_steps": 10, "num_stable_steps": 70, "num_decay_steps": 20}
    scheduler = get_wsd_schedule(optimizer, **steps, decay_type="linear", min_lr_ratio=0.1)
    expected = []
    for _ in range(100):
        optimizer.step()
        scheduler.step()
        expected.append(optimizer.param_groups[0]["lr"])
    # It begins its warm-up at the ratio, not at 0.
    assert factors(100, "wsd")[10:] == pytest.approx(expected[10:])


@given(
    st.integers(1, 500), *[st.floats(0, 1)] * 3, st.integers(0, 1000),
    st.sampled_from(get_args(ScheduleName)),
)  # fmt: skip
def test_the_learning_rate_never_leaves_its_range(steps, warmup, decay, final, step, schedule):
    found = factor(steps, schedule, warmup=warmup, decay=decay, final=final)(step)
    assert 0 <= found <= 1
    if step >= steps - 1 and round(steps * warmup) < steps and steps > 1:
        assert found == pytest.approx(1.0 if schedule == "constant" else final)

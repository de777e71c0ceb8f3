import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from foam_lightning.job import Job
from tuner.trials.runner import (
    SEED_DEVIATION,
    Difference,
    TrialResult,
    TrialRunner,
    paired_difference,
)

TOKENS = [10, 10, 5]


def trial_result(*losses: float, tokens: list[int] = TOKENS) -> TrialResult:
    """Make a run from the mean loss of each batch."""
    return TrialResult([a * b for a, b in zip(losses, tokens, strict=True)], tokens)


def test_the_loss_is_over_tokens_not_batches() -> None:
    assert trial_result(1.0, 2.0, 4.0).loss == pytest.approx((10 + 20 + 20) / 25)
    assert math.isnan(trial_result(1.0, math.nan, 4.0).loss)


def test_equal_differences_of_all_batches_have_the_interval_of_the_seed() -> None:
    for runs, others in (
        (trial_result(1.5, 2.5, 4.5), trial_result(1.0, 2.0, 4.0)),
        (TrialResult([3.0], [2]), TrialResult([2.0], [2])),
    ):
        found = paired_difference([runs], [others])
        assert found.mean == pytest.approx(0.5)
        assert found.half_width == pytest.approx(1.96 * SEED_DEVIATION)


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_the_interval_is_that_of_a_bootstrap_over_batches_and_seeds(num_seeds: int) -> None:
    random = np.random.default_rng(num_seeds)
    tokens = random.integers(800, 1000, 32)
    gaps = random.normal(-0.02, 0.04, (num_seeds, 32)) * tokens
    others = random.normal(4.0, 0.5, (num_seeds, 32)) * tokens
    found = paired_difference(
        [TrialResult(nats.tolist(), tokens.tolist()) for nats in others + gaps],
        [TrialResult(nats.tolist(), tokens.tolist()) for nats in others],
    )
    draws = []
    for of_seed in gaps:
        drawn = random.integers(0, 32, (20_000, 32))
        means = of_seed[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
        draws.append(means + random.normal(0, SEED_DEVIATION, 20_000))
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    assert found.half_width == pytest.approx((high - low) / 2, rel=0.05)
    assert found.mean == pytest.approx((high + low) / 2, abs=5e-4)


@pytest.mark.parametrize(
    ("runs", "others", "message"),
    [
        ([], [], "0 runs do not pair with 0"),
        ([trial_result(1, 1, 1)], [], "1 runs do not pair with 0"),
        ([trial_result(1, 1, 1)], [trial_result(1, 1, 1, tokens=[10, 10, 6])], "different batches"),
        ([trial_result(1, 1, 1)], [trial_result(1, 1, tokens=[10, 10])], "different batches"),
    ],
)
def test_runs_that_do_not_pair_are_refused(
    runs: list[TrialResult], others: list[TrialResult], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(runs, others)


@pytest.mark.parametrize(
    ("mean", "half_width", "text"),
    [
        (-0.0123, 0.02, "-0.012 ± 0.020"),
        (0.05223, 0.02574, "+0.052 ± 0.026"),
        (-0.0123, 0.00314, "-0.0123 ± 0.0031"),
        (0.1, 0.0996, "+0.10 ± 0.10"),
        (31.4, 12.4, "+31 ± 12"),
        (math.nan, math.nan, "+nan ± nan"),
    ],
)
def test_a_difference_has_the_two_significant_digits_of_its_interval(
    mean: float, half_width: float, text: str
) -> None:
    difference = Difference(mean, half_width)
    assert str(difference) == text
    assert difference.size == text[1:]


def test_a_difference_is_decided_where_its_interval_excludes_zero() -> None:
    assert not Difference(mean=-0.0123, half_width=0.02).is_decided
    assert Difference(mean=-0.03, half_width=0.02).is_decided


def test_the_same_plan_and_seed_give_the_same_run(new_job: Callable[..., Job]) -> None:
    job = new_job(data={"micro_batch_size": 4})
    plan, steps = job.uniform_plan(2), []
    runner = TrialRunner(job, on_step=lambda: steps.append(1))
    first = runner.run(plan, num_steps=5, seed=3)
    assert runner.run(plan, num_steps=5, seed=3) == first
    assert TrialRunner(job).run(plan, num_steps=5, seed=3) == first
    assert runner.run(plan, num_steps=5, seed=4) != first
    assert len(steps) == 3 * 5
    assert sum(first.num_tokens) == 20 * 15
    assert len(first.num_tokens) == 5


def test_the_curve_is_the_training_loss_of_every_step(new_job: Callable[..., Job]) -> None:
    whole, halves = new_job(), new_job(data={"micro_batch_size": 4})
    batches = [job.memory_options.accumulate_grad_batches for job in (whole, halves)]
    assert batches == [1, 2]
    one, other = (
        TrialRunner(job).run(job.uniform_plan(2), num_steps=5, seed=0) for job in (whole, halves)
    )
    assert len(one.curve) == 5
    assert one.curve == pytest.approx(other.curve, rel=1e-4)
    assert one.curve[0] == pytest.approx(math.log(whole.model.vocab_size), rel=0.1)


def test_plans_of_one_seed_pair(job: Job) -> None:
    runner = TrialRunner(job)
    adam, folded = (runner.run(job.uniform_plan(level), num_steps=8, seed=0) for level in (0, 2))
    # A plan at no learning rate shows the weights that both started from.
    still = [
        runner.run(replace(job.uniform_plan(level), lr=1e-30), num_steps=1, seed=0)
        for level in (0, 2)
    ]
    assert still[0] == still[1]
    assert still[0].loss > folded.loss != adam.loss
    assert paired_difference([folded], [adam]).half_width < 0.1


def test_a_short_run_is_a_complete_schedule(job: Job) -> None:
    # The rate of the short run has decayed to the end, that of the long one has not.
    runner, plan = TrialRunner(job), job.uniform_plan(2)
    assert runner.run(plan, num_steps=4, seed=0) != runner.run(plan, num_steps=8, seed=0)

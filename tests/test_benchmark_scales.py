from collections.abc import Callable
from pathlib import Path

import pytest

from foam_lightning.job import Job
from foam_lightning.roles import ROLES, role_of
from tests.benchmarks.kept_runs import ScaleByName
from tests.benchmarks.scales import BY_ROLE, EQUAL, adam_rows, measure, rows_of
from tuner.objective import Bench
from tuner.scales import rms_by_level

RMS = {
    role: {level: 0.4 + 0.05 * level + 0.1 * i for level in range(9)}
    for i, role in enumerate(ROLES)
}
STEPS = 6


def test_every_row_is_another_run(job: Job) -> None:
    rows = [*adam_rows(job), *rows_of(job, RMS, 3)]
    assert len({row.key(0, STEPS) for row in rows}) == len(rows)
    assert len({(row.name, row.rule) for row in rows}) == len(rows)


def test_the_rules_give_updates_of_the_size_of_uniform_level_2(job: Job) -> None:
    rms = rms_by_level(RMS, job.new_module().foldable)
    target = job.plan_at(2).scales[2] * rms[2]
    rows = rows_of(job, RMS, 3)
    for row in rows:
        for name, level in row.plan.levels.items():
            if row.rule == EQUAL:
                assert row.plan.scales[level] * rms[level] == pytest.approx(target, rel=5.1e-3)
            if row.rule == BY_ROLE:
                assert row.scales is not None
                assert row.scales[name] * RMS[role_of(name)][level] == pytest.approx(target)


def test_scales_by_name_that_are_the_plans_change_nothing_and_others_do(job: Job) -> None:
    plan, names = job.plan_at(2), job.new_module().foldable
    bench = Bench(job)
    plain = bench.run(plan, num_steps=STEPS, seed=0)
    same = ScaleByName(dict.fromkeys(names, plan.scales[2]))
    other = ScaleByName({n: 0.1 if role_of(n) == "q" else plan.scales[2] for n in names})
    assert bench.run(plan, num_steps=STEPS, seed=0, callbacks=[same]) == plain
    assert bench.run(plan, num_steps=STEPS, seed=0, callbacks=[other]) != plain


@pytest.mark.slow
def test_an_interrupted_measurement_goes_on(
    tmp_path: Path, new_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, kept = new_job(), tmp_path / "found.json"
    run, count = Bench.run, 0

    def interrupted(*arguments: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return run(*arguments, **options)  # type: ignore[arg-type]

    options = {"num_seeds": 1, "num_mixed": 0, "num_steps": STEPS}
    monkeypatch.setattr(Bench, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(job, **options, kept=kept)
    text = measure(job, **options, kept=kept)
    rows = len(adam_rows(job)) + len(rows_of(job, RMS, 0))
    assert count == rows + 1  # the one that was interrupted ran twice
    assert measure(job, **options, kept=kept) == text
    assert count == rows + 1
    assert text.count("\n| ") == rows + 1 + 12  # the header, and the table of RMS

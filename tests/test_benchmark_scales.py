import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.job import Job
from foam_lightning.roles import ROLES, role_of
from tests.benchmarks.scales import BY_ROLE, EQUAL, adam_rows, measure, rms_by_level, rows_of
from tuner.objective import Bench

RMS = {
    role: {level: 0.4 + 0.05 * level + 0.1 * i for level in range(9)}
    for i, role in enumerate(ROLES)
}
STEPS = 6
SIZES = st.floats(1e-6, 1e6)
SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.1.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.mlp.up_proj.weight": (16, 4),
}


def test_every_row_is_another_run(job: Job) -> None:
    rows = [*adam_rows(job), *rows_of(job, RMS, 3)]
    assert len({row.key(0, STEPS) for row in rows}) == len(rows)
    assert len({(row.name, row.rule) for row in rows}) == len(rows)


def test_the_rules_give_updates_of_the_size_of_uniform_level_2(job: Job) -> None:
    rms = rms_by_level(RMS, job.new_module().foldable)
    folded = job.new_module().hparams["scale"]
    for row in rows_of(job, RMS, 3):
        for name, level in row.plan.levels.items():
            scale = row.plan.scales[name]
            if row.rule == EQUAL:
                assert scale * rms[level] == pytest.approx(folded * rms[2])
            if row.rule == BY_ROLE:
                assert scale * RMS[role_of(name)][level] == pytest.approx(folded * rms[2])


@given(st.tuples(SIZES, SIZES))
def test_the_rms_of_a_level_is_that_of_all_elements(sizes: tuple[float, float]) -> None:
    q, up = sizes
    found = rms_by_level({"q": {0: q, 2: 2 * q}, "up": {0: up, 2: 2 * up}}, SHAPES)
    elements = [q] * 32 + [up] * 64
    assert found[0] == pytest.approx(math.sqrt(math.fsum(x * x for x in elements) / 96))
    assert found[2] == pytest.approx(2 * found[0])


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

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.optim.baselines import OPTIMIZERS
from foam_lightning.plan import FoldPlan
from tests.runs import NewJob
from tuner.commands.compare import run_comparison
from tuner.comparison import compare as comparing
from tuner.comparison.compare import MOST_RATES, Contender, Options, compare
from tuner.comparison.profile import OptimizerProfile
from tuner.comparison.report import write_comparison
from tuner.trials.runner import TrialResult

Bowls = dict[str, Callable[[float], float]]


class KilledError(BaseException):
    """Nobody catches a kill."""


class FakeBench:
    """Gives the loss of a bowl at the plan's rate, and dies when its time has come."""

    bowls: Bowls
    asked: list[tuple[str, float, int]]
    die_after: float = math.inf

    def __init__(self, job: Job, on_step: Callable[[], None]) -> None:
        self.job = job
        self._on_step = on_step

    def run(self, plan: FoldPlan, *, num_steps: int, seed: int) -> TrialResult:
        name = self.job.optimizer
        if len(self.asked) >= self.die_after:
            raise KilledError
        self.asked.append((name, plan.lr, seed))
        for _ in range(num_steps):
            self._on_step()
        loss = self.bowls[name](plan.lr) + 0.01 * seed
        return TrialResult([8 * loss, 8 * loss + 0.1], [8, 8])


def bowl(bottom: float, height: float = 3.0) -> Callable[[float], float]:
    return lambda lr: height + math.log(lr / bottom) ** 2


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> type[FakeBench]:
    FakeBench.asked, FakeBench.die_after = [], math.inf
    FakeBench.bowls = {name: bowl(0.01) for name in OPTIMIZERS}
    monkeypatch.setattr(comparing, "TrialRunner", FakeBench)
    monkeypatch.setattr(
        comparing,
        "measure",
        lambda benches, _: {name: OptimizerProfile(1000 * (i + 1), 9000, 0.1) for i, name in
                            enumerate(benches)},
    )  # fmt: skip
    return FakeBench


@pytest.fixture
def job(new_job: NewJob) -> Job:
    return new_job(model={"lr": 0.02, "level": 2})


def losses_of(found: comparing.Comparison, name: str) -> Contender:
    return next(one for one in found.contenders if one.name == name)


def test_each_takes_the_best_of_four_rates_and_runs_it_on_every_seed(
    bench: type[FakeBench], job: Job, tmp_path: Path
) -> None:
    found = compare(job, Options(["foam", "adamw"], 5, 3), tmp_path)
    foam, adamw = losses_of(found, "foam"), losses_of(found, "adamw")
    assert list(foam.losses) == [0.005, 0.01, 0.02, 0.04]
    assert foam.lr == 0.01
    assert not foam.is_at_edge
    assert [(lr, seed) for name, lr, seed in bench.asked if name == "foam"][4:] == [
        (0.01, 1),
        (0.01, 2),
    ]
    assert foam.loss == pytest.approx(3.01 + 0.1 / 16)
    assert adamw.lr == pytest.approx(0.008)  # of .0005, .001, .002, .004, and on while it falls
    assert list(adamw.losses) == [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016]


def test_the_grid_follows_its_edge_in_both_directions_up_to_a_bound(
    bench: type[FakeBench], job: Job, tmp_path: Path
) -> None:
    bench.bowls |= {"foam": bowl(0.0013), "adamw": bowl(1e3)}
    extended: list[None] = []
    found = compare(
        job,
        Options(["foam", "adamw"], 1, 1),
        tmp_path,
        on_extended=lambda: extended.append(None),
    )
    foam, adamw = losses_of(found, "foam"), losses_of(found, "adamw")
    assert foam.lr == 0.00125
    assert list(foam.losses)[:3] == [0.000625, 0.00125, 0.0025]
    assert not foam.is_at_edge
    assert len(adamw.losses) == MOST_RATES
    assert adamw.lr == max(adamw.losses)
    assert adamw.is_at_edge
    assert len(extended) == len(foam.losses) + len(adamw.losses) - 8


def test_a_killed_comparison_goes_on_from_the_runs_it_has(
    bench: type[FakeBench], job: Job, tmp_path: Path
) -> None:
    options = Options(["foam", "adamw", "muon"], 2, 2)
    whole = compare(job, options, tmp_path / "whole")
    expected, bench.asked = bench.asked, []
    bench.die_after = 7
    with pytest.raises(KilledError):
        compare(job, options, tmp_path / "killed")
    bench.die_after = math.inf
    steps = 0

    def on_steps(count: int) -> None:
        nonlocal steps
        steps += count

    found = compare(job, options, tmp_path / "killed", on_steps=on_steps)
    assert bench.asked == expected  # none twice, none left out
    assert found == whole
    assert steps == 2 * len(expected)  # those that were known count


def test_a_changed_job_does_not_take_the_runs_of_another(
    bench: type[FakeBench], job: Job, tmp_path: Path
) -> None:
    options = Options(["foam"], 2, 1)
    compare(job, options, tmp_path)
    before = len(bench.asked)
    compare(job, options, tmp_path)
    assert len(bench.asked) == before
    compare(replace(job, data=replace(job.data, batch_size=4)), options, tmp_path)
    compare(job, replace(options, steps=3), tmp_path)
    assert len(bench.asked) == 3 * before


def test_a_file_that_holds_no_runs_is_refused(
    bench: type[FakeBench], job: Job, tmp_path: Path
) -> None:
    for content in ("{", "[]", '{"a": {"loss": 1}}', '{"a": 3}'):
        (tmp_path / "runs.json").write_text(content)
        with pytest.raises(ConfigError, match=r"runs\.json does not hold runs"):
            compare(job, Options(["foam"], 2, 1), tmp_path)


def test_diverged_runs_are_passed_over_and_said(
    bench: type[FakeBench], job: Job, tmp_path: Path
) -> None:
    def diverging(lr: float) -> float:
        return math.nan if lr > 0.011 else 3 + lr

    bench.bowls |= {"foam": diverging, "muon": lambda _: math.nan}
    options = Options(["foam", "muon", "split_adamw"], 2, 2)
    found = compare(job, options, tmp_path)
    muon = losses_of(found, "muon")
    assert found.contenders[-1] is muon
    assert muon.has_diverged
    assert muon.against(losses_of(found, "foam")) is None
    assert losses_of(found, "foam").lr < 0.01
    assert compare(job, options, tmp_path).contenders[0] == found.contenders[0]  # read back
    page, picture = write_comparison(found, tmp_path, command="x", seed=0)
    assert "| muon | " in page.read_text()
    assert "| diverged | - |" in page.read_text()
    assert "0.04: diverged" in page.read_text()
    assert imread(picture).shape[0] > 500


def test_a_decomposition_of_no_numbers_is_a_diverged_run(
    bench: type[FakeBench], job: Job, tmp_path: Path
) -> None:
    def failing(lr: float) -> float:
        if lr > 0.015:
            torch.linalg.svd(torch.full((2, 2), math.nan))
        return 3 + abs(lr - 0.01)

    bench.bowls["galore"] = failing
    found = compare(job, Options(["galore"], 1, 1), tmp_path)
    (galore,) = found.contenders
    assert galore.lr == 0.01
    assert [lr for lr, loss in galore.losses.items() if math.isnan(loss)] == [0.02]


def test_the_control_is_the_better_of_the_two(
    bench: type[FakeBench], job: Job, tmp_path: Path
) -> None:
    bench.bowls |= {"adamw": bowl(0.002, 3.5), "split_adamw": bowl(0.02, 3.2)}
    found = compare(job, Options(["foam", "adamw", "split_adamw"], 2, 2), tmp_path)
    assert found.control is losses_of(found, "split_adamw")
    gap = losses_of(found, "adamw").against(found.control)
    assert gap is not None
    assert gap.mean == pytest.approx(0.3, abs=0.01)
    assert gap.is_decided
    alone = compare(job, Options(["foam"], 2, 1), tmp_path)
    assert alone.control is None


@pytest.mark.parametrize(
    ("names", "steps", "seeds", "said"),
    [
        ("foam,adamax", 300, 2, "adamax.*foam, adamw"),
        ("", 300, 2, "no optimizer"),
        (None, 0, 2, "--steps 0"),
        (None, 300, 0, "--seeds 0"),
    ],
)
def test_bad_options_are_refused(names: str | None, steps: int, seeds: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Options.of(names, steps, seeds)


def test_names_may_stand_in_any_order_and_none_means_all() -> None:
    assert Options.of("muon, foam", 1, 1).optimizers == ["foam", "muon"]
    assert {"foam", "adamw", "split_adamw", "muon"} <= set(Options.of(None, 1, 1).optimizers)


def test_the_command_writes_table_picture_and_runs(
    new_job: NewJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = new_job(model={"lr": 0.02, "level": 2})
    options = Options(["foam", "split_adamw"], 3, 2)
    folder = tmp_path / "compare"
    found = run_comparison(job, options, folder, command="python cli.py compare")
    said = capsys.readouterr().out
    assert said.startswith("compare: foam, split_adamw\n")
    assert "10 runs of 3 steps" in said
    page = (folder / "compare.md").read_text(encoding="utf-8")
    assert "`python cli.py compare`" in page
    assert "the control" in page
    assert imread(folder / "compare.png").shape[1] > 1000
    kept: dict[str, Any] = json.loads((folder / "runs.json").read_text())
    assert {entry["optimizer"] for entry in kept.values()} == {"foam", "split_adamw"}
    of_foam, of_adamw = (found.profiles[name] for name in options.optimizers)
    assert 0 < of_foam.state_bytes < of_adamw.state_bytes < of_adamw.peak_bytes
    assert of_foam.peak_bytes < of_adamw.peak_bytes
    assert of_foam.step_seconds > 0
    # The same batches and weights: at the same rates the runs differ by the optimizer alone.
    foam, adamw = losses_of(found, "foam"), losses_of(found, "split_adamw")
    assert list(foam.losses)[:4] == list(adamw.losses)[:4]
    assert set(foam.losses.values()).isdisjoint(adamw.losses.values())

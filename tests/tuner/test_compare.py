import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.optim.baselines import OPTIMIZERS
from foam_lightning.plan import FoldPlan
from tests.support.runs import NewJob
from tests.tuner.test_profile import SmallRunner
from tuner.commands.compare import run_comparison
from tuner.comparison import compare as comparing
from tuner.comparison.compare import MAX_RATES, CompareOptions, Comparison, compare
from tuner.comparison.profile import num_profile_steps
from tuner.comparison.report import compare_table, write_comparison
from tuner.trials.runner import TrialResult


class KilledError(BaseException):
    """A kill, which nothing catches."""


class FakeRunner(SmallRunner):
    """Computes the loss from the learning rate instead of training; may be killed."""

    losses: dict[str, Callable[[float], float]]
    ran: list[tuple[str, float, int]]
    killed_after: float = math.inf

    def __init__(self, job: Job, on_step: Callable[[], None]) -> None:
        self.job = job
        self._on_step = on_step

    def run(self, plan: FoldPlan, *, num_steps: int, seed: int) -> TrialResult:
        name = self.job.model.optimizer
        if len(self.ran) >= self.killed_after:
            raise KilledError
        self.ran.append((name, plan.lr, seed))
        for _ in range(num_steps):
            self._on_step()
        loss = self.losses[name](plan.lr) + 0.01 * seed
        return TrialResult([8 * loss, 8 * loss + 0.1], [8, 8])


def bowl(best_lr: float, lowest: float = 3.0) -> Callable[[float], float]:
    return lambda lr: lowest + math.log(lr / best_lr) ** 2


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> type[FakeRunner]:
    FakeRunner.ran, FakeRunner.killed_after = [], math.inf
    FakeRunner.losses = {name: bowl(0.01) for name in OPTIMIZERS}
    monkeypatch.setattr(comparing, "TrialRunner", FakeRunner)
    return FakeRunner


@pytest.fixture
def job(new_job: NewJob) -> Job:
    return new_job(model={"lr": 0.02, "level": 2})


def result_of(found: Comparison, name: str) -> comparing.OptimizerResult:
    return next(result for result in found.results if result.name == name)


def test_each_optimizer_runs_on_every_seed_at_the_best_of_four_rates(
    runner: type[FakeRunner], job: Job, tmp_path: Path
) -> None:
    found = compare(job, CompareOptions(["foam", "adamw"], 5, 3), tmp_path)
    foam, adamw = result_of(found, "foam"), result_of(found, "adamw")
    assert list(foam.losses) == [0.005, 0.01, 0.02, 0.04]
    assert foam.lr == 0.01
    assert not foam.is_at_edge
    ran = [(lr, seed) for name, lr, seed in runner.ran if name == "foam"]
    assert ran[4:] == [(0.01, 1), (0.01, 2)]
    assert foam.loss == pytest.approx(3.01 + 0.1 / 16)
    assert adamw.lr == pytest.approx(0.008)  # of .0005, .001, .002, .004, and on while it falls
    assert list(adamw.losses) == [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016]


def test_more_rates_are_tried_in_both_directions_up_to_a_limit(
    runner: type[FakeRunner], job: Job, tmp_path: Path
) -> None:
    runner.losses |= {"foam": bowl(0.0013), "adamw": bowl(1e3)}
    added: list[None] = []
    options = CompareOptions(["foam", "adamw"], 1, 1)
    found = compare(job, options, tmp_path, on_added_run=lambda: added.append(None))
    foam, adamw = result_of(found, "foam"), result_of(found, "adamw")
    assert foam.lr == 0.00125
    assert list(foam.losses)[:3] == [0.000625, 0.00125, 0.0025]
    assert not foam.is_at_edge
    assert len(adamw.losses) == MAX_RATES
    assert adamw.lr == max(adamw.losses)
    assert adamw.is_at_edge
    assert len(added) == len(foam.losses) + len(adamw.losses) - 8


def test_a_killed_comparison_resumes_and_does_no_run_twice(
    runner: type[FakeRunner], job: Job, tmp_path: Path
) -> None:
    options = CompareOptions(["foam", "adamw", "muon"], 2, 2)
    whole = compare(job, options, tmp_path / "whole")
    expected, runner.ran = runner.ran, []
    runner.killed_after = 7
    with pytest.raises(KilledError):
        compare(job, options, tmp_path / "killed")
    runner.killed_after = math.inf
    steps: list[int] = []
    found = compare(job, options, tmp_path / "killed", on_steps=steps.append)
    assert runner.ran == expected
    assert found.results == whole.results
    assert sum(steps) == 2 * len(expected) + num_profile_steps(3)  # finished runs count too


def test_a_changed_job_does_not_reuse_the_runs_of_another(
    runner: type[FakeRunner], job: Job, tmp_path: Path
) -> None:
    options = CompareOptions(["foam"], 2, 1)
    compare(job, options, tmp_path)
    before = len(runner.ran)
    compare(job, options, tmp_path)
    assert len(runner.ran) == before
    compare(replace(job, data=replace(job.data, batch_size=4)), options, tmp_path)
    compare(job, replace(options, steps=3), tmp_path)
    assert len(runner.ran) == 3 * before


@pytest.mark.parametrize("content", ["{", "[]", '{"a": {"loss": 1}}', '{"a": 3}'])
def test_a_file_without_runs_is_refused(
    content: str, runner: type[FakeRunner], job: Job, tmp_path: Path
) -> None:
    (tmp_path / "runs.json").write_text(content)
    with pytest.raises(ConfigError, match=r"runs\.json"):
        compare(job, CompareOptions(["foam"], 2, 1), tmp_path)


def test_diverged_runs_are_reported_and_never_the_best(
    runner: type[FakeRunner], job: Job, tmp_path: Path
) -> None:
    runner.losses |= {
        "foam": lambda lr: math.nan if lr > 0.011 else 3 + lr,
        "muon": lambda _: math.nan,
    }
    options = CompareOptions(["foam", "muon", "split_adamw"], 2, 2)
    found = compare(job, options, tmp_path)
    muon, foam = result_of(found, "muon"), result_of(found, "foam")
    assert found.results[-1] is muon
    assert muon.has_diverged
    assert muon.against(foam) is None
    assert foam.lr < 0.01
    assert compare(job, options, tmp_path).results[0] == found.results[0]  # read back
    page, picture = write_comparison(found, tmp_path, command="x", seed=0)
    text = page.read_text(encoding="utf-8")
    assert "| muon | diverged | - |" in text
    assert "0.04: diverged" in text
    assert imread(picture).shape[0] > 500


def test_a_run_whose_svd_fails_has_diverged(
    runner: type[FakeRunner], job: Job, tmp_path: Path
) -> None:
    def failing(lr: float) -> float:
        if lr > 0.015:
            torch.linalg.svd(torch.full((2, 2), math.nan))
        return 3 + abs(lr - 0.01)

    runner.losses["galore"] = failing
    (galore,) = compare(job, CompareOptions(["galore"], 1, 1), tmp_path).results
    assert galore.lr == 0.01
    assert [lr for lr, loss in galore.losses.items() if math.isnan(loss)] == [0.02]


def test_the_baseline_is_the_better_of_the_two_adams(
    runner: type[FakeRunner], job: Job, tmp_path: Path
) -> None:
    runner.losses |= {"adamw": bowl(0.002, 3.5), "split_adamw": bowl(0.02, 3.2)}
    found = compare(job, CompareOptions(["foam", "adamw", "split_adamw"], 2, 2), tmp_path)
    assert found.baseline is result_of(found, "split_adamw")
    gap = result_of(found, "adamw").against(found.baseline)
    assert gap is not None
    assert gap.mean == pytest.approx(0.3, abs=0.01)
    assert gap.is_decided
    assert compare(job, CompareOptions(["foam"], 2, 1), tmp_path).baseline is None


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_shows_every_number_at_any_width(
    width: int, runner: type[FakeRunner], job: Job, tmp_path: Path
) -> None:
    found = compare(job, CompareOptions(["foam", "split_adamw"], 2, 2), tmp_path)
    console = Console(width=width, file=io.StringIO(), no_color=True)
    console.print(compare_table(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    for result in found.results:
        assert f"{result.loss:.4f}" in text
        assert f"{result.lr:.3g}" in text
    assert "526.3 kB" in text
    assert "…" not in text


def test_names_may_be_in_any_order_and_none_means_all() -> None:
    assert CompareOptions.parse("muon, foam", 1, 1).optimizers == ["foam", "muon"]
    every = set(CompareOptions.parse(None, 1, 1).optimizers)
    assert {"foam", "adamw", "split_adamw", "muon"} <= every


def test_the_command_writes_table_picture_and_runs(
    new_job: NewJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = new_job(model={"lr": 0.02, "level": 2})
    options = CompareOptions(["foam", "split_adamw"], 3, 2)
    folder = tmp_path / "compare"
    found = run_comparison(job, options, folder, command="python cli.py compare")
    said = capsys.readouterr().out
    assert "10 runs of 3 steps" in said
    page = (folder / "compare.md").read_text(encoding="utf-8")
    assert "`python cli.py compare`" in page
    assert "| split_adamw |" in page
    assert imread(folder / "compare.png").shape[1] > 1000
    runs = json.loads((folder / "runs.json").read_text())
    assert {entry["optimizer"] for entry in runs.values()} == {"foam", "split_adamw"}
    of_foam, of_adamw = (found.profiles[name] for name in options.optimizers)
    assert 0 < of_foam.state_bytes < of_adamw.state_bytes < of_adamw.peak_bytes
    assert of_foam.peak_bytes < of_adamw.peak_bytes
    assert of_foam.step_seconds > 0
    # The same batches and weights: at the same rates the runs differ by the optimizer alone.
    foam, adamw = result_of(found, "foam"), result_of(found, "split_adamw")
    assert list(foam.losses)[:4] == list(adamw.losses)[:4]
    assert set(foam.losses.values()).isdisjoint(adamw.losses.values())

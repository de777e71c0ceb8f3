"""Whole runs in which memory runs out."""

import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

import cli
from foam_lightning.errors import MemoryFallbackError
from foam_lightning.plan import FoldPlan
from foam_lightning.units import format_bytes
from tests.support.fallback_case import FallbackCase, leftovers
from tests.support.limited import limited
from tuner.oom_fallback import Fallback
from tuner.trials.runner import TrialResult, TrialRunner

COMPLETE = optuna.trial.TrialState.COMPLETE
pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> FallbackCase:
    case = FallbackCase(tmp_path_factory.mktemp("undisturbed"))
    assert cli.main(["fit", *case.words]) == 0
    assert case.summary()["fallbacks"] == 0
    assert not (case.folder / "fallback.json").exists()
    return case


@pytest.mark.slow
def test_a_run_falls_back_starts_afresh_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, undisturbed: FallbackCase
) -> None:
    case = FallbackCase(tmp_path)
    process = case.start(case.limit)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    told = [line for line in output.splitlines() if line.startswith("memory ran out")]
    assert len(told) == 2
    assert "in training, after step 2: CUDA out of memory" in told[0]
    assert "2 micro-batches of 2 instead of a batch of 4" in told[0]
    assert "once" in told[1]
    assert "2 micro-batches of 2" in told[1]
    assert case.summary()["final_validation_loss"] == pytest.approx(
        undisturbed.summary()["final_validation_loss"], abs=1e-4
    )
    assert case.summary()["fallbacks"] == 1
    (event,) = case.fallback()["events"]
    assert (event["where"], event["step"]) == ("training", 2)
    assert event["predicted_peak_bytes"] == case.peak(case.plan.memory_options)
    assert event["to"] == case.fallback()["memory_options"]
    plan = FoldPlan.load(case.folder / "fold_plan.json")
    assert plan == replace(case.plan, memory_options=case.second)
    assert leftovers(case.folder) == []
    assert [path.name for path in case.folder.parent.iterdir()] == ["version_0"]
    weights = torch.load(case.checkpoint, weights_only=True)["state_dict"]
    expected = torch.load(undisturbed.checkpoint, weights_only=True)["state_dict"]
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_run_killed_before_it_could_start_afresh_goes_on_with_less(
    tmp_path: Path, undisturbed: FallbackCase
) -> None:
    case = FallbackCase(tmp_path)
    limit = case.limit
    process = case.start(limit, "--die")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, output
    assert Fallback.load(case.folder / "fallback.json").memory_options == case.second  # type: ignore[union-attr]
    with limited(lambda: limit):
        assert cli.main(["fit", *case.words]) == 0
    assert case.summary()["final_validation_loss"] == pytest.approx(
        undisturbed.summary()["final_validation_loss"], abs=1e-4
    )


def repeat(
    case: FallbackCase, command: str, limit: Callable[[], float], capfd: pytest.CaptureFixture[str]
) -> tuple[list[str], list[list[float]], int, str]:
    """Run the same command until it no longer falls back.

    Returns:
        The line of every fall-back, the losses of the finished trials at each, the exit code, and
        the last line of the errors.
    """
    lines: list[str] = []
    trials: list[list[float]] = []
    with limited(limit):
        while True:
            code = cli.main([command, *case.words])
            errors = capfd.readouterr().err
            assert "Traceback" not in errors
            if code != MemoryFallbackError.exit_code:
                return lines, trials, code, errors.strip()
            *_, line, last = errors.splitlines()
            assert last == "run the same command again to resume"
            lines.append(line)
            trials.append(losses(case))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> FallbackCase:
    """One row a step, so that few memory options are left."""
    return FallbackCase(tmp_path_factory.mktemp("single"), "--data.batch_size=1")


@pytest.mark.slow
def test_what_nothing_fits_ends_with_one_line(
    single: FallbackCase, capfd: pytest.CaptureFixture[str]
) -> None:
    options = single.options_in_order()
    least = single.peak(options[-1])
    lines, _, code, error = repeat(single, "fit", lambda: least // 2, capfd)
    assert code == 3
    assert len(lines) == len(options) - 1 >= 2
    for line in [*lines, error]:
        assert "memory ran out in training, after step 0" in line
    assert f"no memory options are left after {len(lines)} fall-backs" in error
    assert format_bytes(least) in error
    assert len(error.splitlines()) == 1
    assert len(single.fallback()["events"]) == len(lines)
    assert leftovers(single.folder) == []
    assert not list(single.folder.glob("checkpoints/*"))
    assert not (single.folder / "summary.json").exists()


@pytest.mark.slow
def test_search_and_training_keep_what_is_finished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = FallbackCase(tmp_path, "--memory-budget=24GB", "--tune.trials=4", "--tune.steps=4")
    case.plan = case.job.uniform_plan(0)  # Adam needs most, and runs first
    options = case.options_in_order(3)
    peaks = [case.peak(one) for one in options]
    ended: list[TrialResult] = []
    run = TrialRunner.run

    def limit() -> float:
        if case.checkpoint.exists():
            return (peaks[1] + peaks[2]) // 2
        return (peaks[0] + peaks[1]) // 2 if ended else math.inf

    def run_and_count(runner: TrialRunner, *args: Any, **kwargs: Any) -> TrialResult:
        ended.append(run(runner, *args, **kwargs))
        return ended[-1]

    monkeypatch.setattr(TrialRunner, "run", run_and_count)
    monkeypatch.setattr("tuner.pipeline.write_report", lambda *_: {})  # its plots take seconds
    (in_search, in_training), (first, second), code, _ = repeat(case, "fit", limit, capfd)
    assert code == 0
    assert "in a short run of the search" in in_search
    assert "2 micro-batches of 2 instead of a batch of 4" in in_search
    assert "in training, after step 2" in in_training
    assert "4 micro-batches of 1 instead of 2 micro-batches of 2" in in_training
    # What is searched stays as it was: no trial runs again, in spite of other memory options.
    assert len(first) == 1
    assert second[:1] == first
    assert len(second) > 5
    assert losses(case) == second
    plan = FoldPlan.load(case.folder / "fold_plan.json")
    assert plan.memory_options == options[2]
    *_, rehearsal = json.loads((case.folder / "tuning" / "rehearsal.json").read_text())
    assert rehearsal["fold_plan"] == plan.to_json()
    assert torch.load(case.checkpoint, weights_only=True)["global_step"] == 16
    assert case.summary()["fallbacks"] == 2


def losses(case: FallbackCase) -> list[float]:
    """Read the losses of the finished trials, oldest first."""
    path = case.folder / "tuning" / "study.db"
    if not path.exists():
        return []
    database = f"sqlite:///{path}"
    names = optuna.get_all_study_names(storage=database)
    studies = [optuna.load_study(study_name=name, storage=database) for name in names]
    trials = [trial for study in studies for trial in study.get_trials(states=(COMPLETE,))]
    return [t.values[0] for t in sorted(trials, key=lambda t: t.datetime_complete or t.number)]

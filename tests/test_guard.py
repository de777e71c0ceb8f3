"""What happens when memory runs out all the same."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

import cli
from foam_lightning.errors import FellBackError
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan, Levers
from foam_lightning.units import in_words
from tests.limited import limited
from tests.tiny import REPOSITORY, write_settings
from tuner import guard
from tuner.fitting import Fitting
from tuner.guard import Fallback
from tuner.settings import parse

COMPLETE = optuna.trial.TrialState.COMPLETE
pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself


class Case:
    """A tiny run whose plan and rungs are known."""

    def __init__(self, folder: Path, *words: str) -> None:
        folder.mkdir(exist_ok=True)
        self.words = ["--config", str(write_settings(folder)), *words]
        self.job: Job = parse("fit", self.words, default=None).job()
        self.fitting = Fitting(self.job, sys.maxsize)
        self.plan = self.job.plan_at(2)
        self.folder = folder / "runs" / "default" / "version_0"
        self.checkpoint = self.folder / "checkpoints" / "last.ckpt"

    def peak(self, levers: Levers) -> int:
        return self.fitting.accountant.account(replace(self.plan, levers=levers)).peak_bytes

    def rungs(self) -> list[Levers]:
        rungs: list[Levers] = []
        rung: Levers | None = self.plan.levers
        while rung is not None:
            rungs.append(rung)
            rung = self.fitting.ladder.next_rung(rung, self.peak)
        return rungs

    def limit_between(self, rung: int) -> int:
        """Give a limit that this rung is above and the next one below."""
        above, below = (self.peak(levers) for levers in self.rungs()[rung : rung + 2])
        return (above + below) // 2

    def start(self, limit: int, *options: str) -> "subprocess.Popen[str]":
        words = [str(limit), str(self.checkpoint), *options, "fit", *self.words]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.limited", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def summary(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return content

    def fallback(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "fallback.json").read_text())
        return content


def leftovers(folder: Path) -> list[str]:
    """Name what a run may only have for a moment."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix in (".part", ".tmp") or path.name == "rehearsal.ckpt"
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Case:
    case = Case(tmp_path_factory.mktemp("undisturbed"))
    assert cli.main(["fit", *case.words]) == 0
    assert "fallbacks" not in case.summary()
    assert not (case.folder / "fallback.json").exists()
    return case


@pytest.mark.slow
def test_a_run_falls_back_starts_afresh_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, undisturbed: Case
) -> None:
    case = Case(tmp_path)
    process = case.start(case.limit_between(0))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    told = [line for line in output.splitlines() if line.startswith("memory ran out")]
    assert told[0].startswith(
        "memory ran out in training, after step 2: CUDA out of memory. Tried to allocate "
    )
    assert "micro-batches of 2 x 2 instead of 4 x 1" in told[0]
    assert told[1:] == ["memory ran out before (1x); going on with micro-batches of 2 x 2"]
    assert case.summary()["final_validation_loss"] == pytest.approx(
        undisturbed.summary()["final_validation_loss"], abs=1e-4
    )
    (event,) = case.fallback()["events"]
    assert (event["where"], event["step"]) == ("training", 2)
    assert event["predicted_peak_bytes"] == case.peak(case.plan.levers)
    assert event["to"] == case.fallback()["levers"]
    plan = FoldPlan.load(case.folder / "fold_plan.json")
    assert plan == replace(case.plan, levers=case.rungs()[1])
    assert leftovers(case.folder) == []
    assert [path.name for path in case.folder.parent.iterdir()] == ["version_0"]
    weights = torch.load(case.checkpoint, weights_only=True)["state_dict"]
    expected = torch.load(undisturbed.checkpoint, weights_only=True)["state_dict"]
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_run_killed_before_it_could_start_afresh_goes_on_with_less(
    tmp_path: Path, undisturbed: Case
) -> None:
    case = Case(tmp_path)
    limit = case.limit_between(0)
    process = case.start(limit, "--die")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, output
    assert Fallback.load(case.folder / "fallback.json").levers == case.rungs()[1]  # type: ignore[union-attr]
    with limited(lambda: limit):
        assert cli.main(["fit", *case.words]) == 0
    assert case.summary()["final_validation_loss"] == pytest.approx(
        undisturbed.summary()["final_validation_loss"], abs=1e-4
    )


def walk(
    case: Case, command: str, limit: Callable[[], float], capfd: pytest.CaptureFixture[str]
) -> list[str]:
    """Type the same command until it ends otherwise than by falling back; give what was said."""
    said = []
    with limited(limit):
        while True:
            code = cli.main([command, *case.words])
            output, errors = capfd.readouterr()
            if code != FellBackError.exit_code:
                return [*said, f"{code} {errors.strip()}" if code else output]
            assert errors == "type the same command again to go on\n"
            said.append(output.splitlines()[-1])


@pytest.mark.slow
def test_what_nothing_fits_ends_with_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path, "--data.batch_size=1")
    rungs = case.rungs()
    least = case.peak(rungs[-1])
    *fell, end = walk(case, "fit", lambda: least // 2, capfd)
    assert len(fell) == len(rungs) - 1 >= 2
    assert all(line.startswith("memory ran out in training, after step 0: CUDA") for line in fell)
    assert end.startswith("3 error: memory ran out in training, after step 0: CUDA out of memory")
    assert f"no lever is left after {len(fell)} fall-backs that needs less" in end
    assert f"predicted {in_words(least)}" in end
    assert len(end.splitlines()) == 1
    assert len(case.fallback()["events"]) == len(fell)
    assert leftovers(case.folder) == []
    assert not list(case.folder.glob("checkpoints/*"))
    assert not (case.folder / "summary.json").exists()


@pytest.mark.slow
def test_a_search_keeps_its_finished_trials(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, "--memory-budget=24GB")
    case.plan = case.job.plan_at(0)  # Adam needs most, and runs first
    limit, probed = case.limit_between(0), case.folder / "tuning" / "probe.json"
    seen: list[list[float]] = []
    fall_back = guard._fall_back

    def look(*args: Any) -> str:
        seen.append(values(case))
        return fall_back(*args)

    monkeypatch.setattr(guard, "_fall_back", look)
    fell, end = walk(case, "tune", lambda: limit if probed.exists() else math.inf, capfd)
    assert fell.startswith("memory ran out in a short run of the search, after step ")
    assert "micro-batches of 2 x 2 instead of 4 x 1" in fell
    assert "report" in end
    (before,) = seen
    assert len(before) == 1
    assert values(case)[:1] == before
    assert len(values(case)) > 5
    # What is searched stays as it was: every level fits the budget, Adam's too.
    plan = FoldPlan.load(case.folder / "fold_plan.json")
    assert plan.levers == case.rungs()[1]
    assert json.loads((case.folder / "tuning" / "rehearsal.json").read_text())["fold_plan"] == (
        plan.to_json()
    )


def values(case: Case) -> list[float]:
    """Read the losses of the finished trials, oldest first."""
    database = f"sqlite:///{case.folder}/tuning/study.db"
    studies = [
        optuna.load_study(study_name=name, storage=database)
        for name in optuna.get_all_study_names(storage=database)
    ]
    trials = [trial for study in studies for trial in study.get_trials(states=(COMPLETE,))]
    return [t.values[0] for t in sorted(trials, key=lambda t: t.datetime_complete or t.number)]

"""What happens when memory runs out all the same."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

import cli
from foam_lightning.errors import ConfigError, FellBackError, PlanError
from foam_lightning.job import Job
from foam_lightning.memory.device import Usage
from foam_lightning.plan import FoldPlan, Levers
from foam_lightning.run_folder import RunFolder, write_json
from foam_lightning.shortage import MemoryShortageError
from foam_lightning.units import in_words
from tests.fake_gpu import FakeGpu
from tests.limited import limited
from tests.tiny import REPOSITORY, write_settings
from tuner import guard
from tuner.fitting import Fitting
from tuner.guard import Fallback, fallen_to, guarded, start_afresh
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

    def rungs(self, most: int = 99) -> list[Levers]:
        rungs = [self.plan.levers]
        while len(rungs) < most:
            rung = self.fitting.ladder.next_rung(rungs[-1], self.peak)
            if rung is None:
                break
            rungs.append(rung)
        return rungs

    @property
    def second(self) -> Levers:
        return self.rungs(2)[1]

    @property
    def limit(self) -> int:
        """A limit that the plan is above and its second rung below."""
        return (self.peak(self.plan.levers) + self.peak(self.second)) // 2

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
    assert case.summary()["fallbacks"] == 0
    assert not (case.folder / "fallback.json").exists()
    return case


@pytest.mark.slow
def test_a_run_falls_back_starts_afresh_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, undisturbed: Case
) -> None:
    case = Case(tmp_path)
    process = case.start(case.limit)
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
    assert case.summary()["fallbacks"] == 1
    (event,) = case.fallback()["events"]
    assert (event["where"], event["step"]) == ("training", 2)
    assert event["predicted_peak_bytes"] == case.peak(case.plan.levers)
    assert event["to"] == case.fallback()["levers"]
    plan = FoldPlan.load(case.folder / "fold_plan.json")
    assert plan == replace(case.plan, levers=case.second)
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
    limit = case.limit
    process = case.start(limit, "--die")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, output
    assert Fallback.load(case.folder / "fallback.json").levers == case.second  # type: ignore[union-attr]
    with limited(lambda: limit):
        assert cli.main(["fit", *case.words]) == 0
    assert case.summary()["final_validation_loss"] == pytest.approx(
        undisturbed.summary()["final_validation_loss"], abs=1e-4
    )


def walk(
    case: Case, command: str, limit: Callable[[], float], capfd: pytest.CaptureFixture[str]
) -> list[str]:
    """Type the same command until it ends otherwise than by falling back; give what was said."""
    said: list[str] = []
    with limited(limit):
        while True:
            code = cli.main([command, *case.words])
            output, errors = capfd.readouterr()
            assert "Traceback" not in errors
            if code != FellBackError.exit_code:
                return [*said, f"{code} {errors.strip().splitlines()[-1]}" if code else output]
            *_, line, last = errors.splitlines()
            assert last == "type the same command again to go on"
            said.append(line)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One row a step: few rungs."""
    return Case(tmp_path_factory.mktemp("single"), "--data.batch_size=1")


@pytest.mark.slow
def test_what_nothing_fits_ends_with_one_line(
    single: Case, capfd: pytest.CaptureFixture[str]
) -> None:
    case = single
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
def test_search_and_training_keep_what_is_finished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, "--memory-budget=24GB", "--tune.trials=4", "--tune.steps=4")
    case.plan = case.job.plan_at(0)  # Adam needs most, and runs first
    rungs = case.rungs(3)
    peaks = [case.peak(rung) for rung in rungs]
    probed = case.folder / "tuning" / "probe.json"
    seen: list[list[float]] = []
    fall_back = guard._fall_back

    def limit() -> float:
        if case.checkpoint.exists():
            return (peaks[1] + peaks[2]) // 2
        return (peaks[0] + peaks[1]) // 2 if probed.exists() else math.inf

    def look(*args: Any) -> str:
        seen.append(values(case))
        return fall_back(*args)

    monkeypatch.setattr(guard, "_fall_back", look)
    monkeypatch.setattr("tuner.run.write_report", lambda *_: {})  # its plots take seconds
    in_search, in_training, _ = walk(case, "fit", limit, capfd)
    assert in_search.startswith("memory ran out in a short run of the search, after step ")
    assert "micro-batches of 2 x 2 instead of 4 x 1" in in_search
    assert in_training.startswith("memory ran out in training, after step 2: ")
    assert "micro-batches of 1 x 4 instead of 2 x 2" in in_training
    # What is searched stays as it was: no trial runs again, in spite of other levers.
    first, second = seen
    assert len(first) == 1
    assert second[:1] == first
    assert len(second) > 5
    assert values(case) == second
    plan = FoldPlan.load(case.folder / "fold_plan.json")
    assert plan.levers == rungs[2]
    rehearsal = json.loads((case.folder / "tuning" / "rehearsal.json").read_text())
    assert rehearsal["fold_plan"] == plan.to_json()
    assert torch.load(case.checkpoint, weights_only=True)["global_step"] == 16
    assert case.summary()["fallbacks"] == 2


def values(case: Case) -> list[float]:
    """Read the losses of the finished trials, oldest first."""
    database = f"sqlite:///{case.folder}/tuning/study.db"
    studies = [
        optuna.load_study(study_name=name, storage=database)
        for name in optuna.get_all_study_names(storage=database)
    ]
    trials = [trial for study in studies for trial in study.get_trials(states=(COMPLETE,))]
    return [t.values[0] for t in sorted(trials, key=lambda t: t.datetime_complete or t.number)]


# ---- one by one


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.open(tmp_path, "run", "")


def short(plan: FoldPlan) -> MemoryShortageError:
    return MemoryShortageError("training", plan, 12, "CUDA out of memory")


def run_out(fitting: Fitting, folder: RunFolder, plan: FoldPlan) -> str:
    with pytest.raises((FellBackError, MemoryShortageError)) as caught, guarded(fitting, folder):
        raise short(plan)
    return str(caught.value)


def test_the_line_has_figures_and_price(
    tiny: Case, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu()
    gpu.taken = Usage(1, 23_000_000_000, 0)
    monkeypatch.setattr(Job, "gpu", gpu)
    plan = replace(tiny.plan, levers=tiny.second)
    line = run_out(tiny.fitting, folder, plan)
    assert line == (
        "memory ran out in training, after step 12: CUDA out of memory (predicted "
        f"{in_words(tiny.peak(plan.levers))}, taken 23 GB); from here on micro-batches of 1 x 4 "
        "instead of 2 x 2 (price: none while a micro-batch still fills the device)"
    )
    assert gpu.asked == []  # without a budget there is no wall


def test_a_budget_is_a_wall_around_all_that_runs(
    tiny: Case,
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    gpu = FakeGpu()
    monkeypatch.setattr(Job, "gpu", gpu)
    with guarded(tiny.fitting.with_budget(12 * 10**9), folder):
        assert gpu.asked == ["limit 0.5"]  # on a CPU there is no context
    assert gpu.asked == ["limit 0.5", "limit 1"]
    assert capfd.readouterr().out == ""
    with guarded(tiny.fitting.with_budget(25 * 10**9), folder):
        assert gpu.asked[2:] == ["limit 1"]
    warning = capfd.readouterr().out
    assert warning.startswith("the Fake 24 has 23.5 GB free of 24 GB, less than the budget of 25GB")
    assert len(warning.splitlines()) == 1


def test_every_shortage_goes_one_rung_further_and_is_remembered(
    single: Case, folder: RunFolder
) -> None:
    rungs = single.rungs()
    for at, rung in enumerate(rungs[:-1]):
        run_out(single.fitting, folder, replace(single.plan, levers=rung))
        kept = Fallback.load(folder.fallback)
        assert kept is not None
        assert kept.levers == rungs[at + 1]
        assert len(kept.events) == at + 1
    assert kept is not None
    assert [event["step"] for event in kept.events] == [12] * (len(rungs) - 1)
    before = folder.fallback.read_bytes()
    line = run_out(single.fitting, folder, replace(single.plan, levers=rungs[-1]))
    assert f"no lever is left after {len(rungs) - 1} fall-backs that needs less: lower" in line
    assert folder.fallback.read_bytes() == before


def test_the_ninth_time_is_the_end(tiny: Case, folder: RunFolder) -> None:
    for _ in range(8):
        assert "from here on micro-batches of 2 x 2" in run_out(tiny.fitting, folder, tiny.plan)
    assert "no lever is left after 8 fall-backs" in run_out(tiny.fitting, folder, tiny.plan)


def test_of_several_processes_whichever_runs_out_writes_it_down(
    tiny: Case, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    run_out(tiny.fitting, folder, tiny.plan)
    assert fallen_to(folder) == tiny.second
    assert leftovers(folder.path) == []


def test_levers_that_the_settings_contradict_are_passed_over(
    tiny: Case, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Job, levers: Levers) -> None:
        if levers.micro_batch_size == 2:
            raise ConfigError("contradicts")

    monkeypatch.setattr(Job, "check", refuse)
    assert "micro-batches of 1 x 4 instead of 4 x 1" in run_out(tiny.fitting, folder, tiny.plan)


def test_what_a_run_goes_on_with_is_said(
    folder: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fallen_to(None) is fallen_to(folder) is None
    assert capfd.readouterr().out == ""
    levers = Levers(
        micro_batch_size=1,
        accumulate_grad_batches=4,
        activation_checkpointing=True,
        selective_checkpointing=True,
    )
    write_json(folder.fallback, {"levers": asdict(levers), "events": [{}, {}]})
    assert fallen_to(folder) == levers
    assert capfd.readouterr().out == (
        "memory ran out before (2x); going on with micro-batches of 1 x 4, activation "
        "checkpointing, selective checkpointing\n"
    )


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"levers": {"micro_batch_size": 1, "other": 2}, "events": []}']
)
def test_a_damaged_record_is_one_line(folder: RunFolder, content: str) -> None:
    folder.fallback.write_text(content)
    with pytest.raises(PlanError, match=r"cannot read .*fallback\.json .*; delete it to") as caught:
        fallen_to(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: calls.append((path, words)))
    monkeypatch.setattr(os, "set_inheritable", lambda *_: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return calls


def test_the_same_command_starts_afresh(
    executed: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "cli.py", "fit", "--name=a b"])
    start_afresh()
    words = [sys.executable, "-X", "dev", "cli.py", "fit", "--name=a b"]
    assert executed == [(sys.executable, words)]
    worker.join(10)
    assert not worker.is_alive()  # nobody would wait for it any more


def test_one_of_several_processes_does_not_start_afresh(
    executed: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    start_afresh()
    assert executed == []

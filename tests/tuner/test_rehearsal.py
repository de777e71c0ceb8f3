"""The rehearsal: what it measures and remembers, and what happens where it takes too much."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from foam_lightning.job import Job
from foam_lightning.memory.device import GpuUsage, MemoryShortageError, calibrate
from foam_lightning.plan import FoldPlan
from tests.support.fake_gpu import FakeGpu
from tests.support.limited import limited
from tests.support.runs import open_folder
from tuner.planning.planner import BudgetPlanner
from tuner.rehearsal import Rehearsal, rehearse, rehearse_plan, rehearse_tightest_plan
from tuner.run_context import RunContext
from tuner.trials.budget import TuneOptions
from tuner.trials.workers import Worker

ABUNDANT = 10**12
MB = 10**6
NewContext = Callable[[int], RunContext]


@pytest.fixture(scope="module")
def planner(new_job: Callable[..., Job]) -> BudgetPlanner:
    return BudgetPlanner(new_job(), ABUNDANT)


@pytest.fixture
def new_context(planner: BudgetPlanner, tmp_path: Path) -> NewContext:
    folder = open_folder(tmp_path)
    folder.tuning.mkdir()

    def make(budget_bytes: int) -> RunContext:
        return RunContext(
            job=planner.job,
            planner=planner.with_budget(budget_bytes),
            folder=folder,
            tune_options=TuneOptions(),
            worker=Worker(folder.tuning, "tune"),
        )

    return make


def files(context: RunContext) -> list[str]:
    return [path.name for path in context.folder.tuning.iterdir() if path.is_file()]


def records(context: RunContext) -> list[dict[str, Any]]:
    path = context.folder.tuning / "rehearsal.json"
    content: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return content


def remember(context: RunContext, plan: FoldPlan, measured_bytes: int) -> None:
    """Write down a rehearsal that took so much."""
    peak = context.planner.accountant.account(plan).peak_bytes
    rehearsal = Rehearsal(peak, measured_bytes)
    record = {**asdict(rehearsal), "fold_plan": plan.to_json()}
    path = context.folder.tuning / "rehearsal.json"
    path.write_text(json.dumps([record]), encoding="utf-8")


def test_it_measures_two_steps_an_evaluation_and_a_save_and_remembers(
    planner: BudgetPlanner, new_context: NewContext
) -> None:
    plan, context = planner.uniform(1), new_context(ABUNDANT)
    found = rehearse(context, plan)
    assert found.predicted_peak_bytes == planner.accountant.account(plan).peak_bytes
    assert found.measured_peak_bytes == pytest.approx(found.predicted_peak_bytes, rel=0.02)
    assert files(context) == ["rehearsal.json"]  # and no checkpoint
    with limited(lambda: 0):  # where nothing can run
        assert rehearse(context, plan) == found
    smaller = replace(plan.memory_options, micro_batch_size=4, accumulate_grad_batches=2)
    other = rehearse(context, replace(plan, memory_options=smaller))
    assert other.measured_peak_bytes < found.measured_peak_bytes
    assert len(records(context)) == 2


def test_the_record_of_an_older_run_is_read(
    planner: BudgetPlanner, new_context: NewContext
) -> None:
    plan, context = planner.uniform(1), new_context(ABUNDANT)
    record = {
        "predicted_peak_bytes": 5,
        "measured_peak_bytes": 9_600_000_000,
        "allocated_bytes": 8_000_000_000,
        "reserved_bytes": 9_000_000_000,
        "allocator_retries": 2,
        "fold_plan": plan.to_json(),
    }
    (context.folder.tuning / "rehearsal.json").write_text(json.dumps(record), encoding="utf-8")
    found = rehearse(context, plan)
    assert found == Rehearsal(5, 9_600_000_000, *GpuUsage(8_000_000_000, 9_000_000_000, 2))
    for figure in ("9.6 GB measured", "8 GB allocated", "9 GB reserved", "2 allocator retries"):
        assert figure in str(found)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGpu:
    """A calibrated GPU whose context grows by 150 MB in a run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    fake = FakeGpu()
    monkeypatch.setattr(Job, "gpu", fake)
    calibrate(fake)
    fake.growth = 150 * MB
    fake.asked.clear()
    return fake


@pytest.mark.parametrize("room", [100 * MB, 200 * MB])
def test_a_context_that_grows_counts(
    new_job: Callable[..., Job], new_context: NewContext, gpu: FakeGpu, room: int
) -> None:
    job = new_job(trainer={"accelerator": "auto"})
    plan = BudgetPlanner(job, ABUNDANT).uniform(1)
    peak = BudgetPlanner(job, ABUNDANT).accountant.account(plan).peak_bytes
    gpu.taken = GpuUsage(1, peak - 500 * MB, 0)
    planner = BudgetPlanner(job, peak + room)
    context = replace(new_context(ABUNDANT), job=job, planner=planner)
    if room < gpu.growth:
        with pytest.raises(MemoryShortageError, match="the budget is"):
            rehearse_plan(context, planner, plan)
        return
    _, rehearsal = rehearse_plan(context, planner, plan)
    assert rehearsal.measured_peak_bytes == peak + 150 * MB
    assert "650 MB context" in str(rehearsal)
    assert planner.accountant.account(plan).breakdown["context"] == 650 * MB
    assert gpu.asked == ["forget peaks", f"limit {(peak + room - 650 * MB) / gpu.total:.6g}"]
    resumed = BudgetPlanner(job, peak + room)  # reads the record
    rehearse_plan(replace(context, planner=resumed), resumed, plan)
    slack = 0.02  # of the peak
    expected = peak + round(150 * MB / (1 - slack))
    assert resumed.accountant.account(plan).peak_bytes == pytest.approx(expected, abs=2)


def test_a_plan_that_takes_a_little_too_much_folds_further(
    planner: BudgetPlanner, new_context: NewContext
) -> None:
    plan = planner.uniform(1)
    peak = planner.accountant.account(plan).peak_bytes
    context = new_context(peak + 100)
    remember(context, plan, peak + 1_100)
    chosen, rehearsal = rehearse_plan(context, context.planner, plan)
    assert rehearsal.predicted_peak_bytes <= peak - 1_000
    assert rehearsal.measured_peak_bytes <= peak + 100
    assert sum(chosen.levels.values()) > sum(plan.levels.values())
    assert len(records(context)) == 2
    with limited(lambda: 0):  # a second call reads both
        assert rehearse_plan(context, context.planner, plan) == (chosen, rehearsal)


def test_the_search_gets_a_smaller_budget_where_its_tightest_plan_takes_too_much(
    planner: BudgetPlanner, new_context: NewContext
) -> None:
    budget = planner.accountant.account(planner.uniform(1)).peak_bytes + 4096
    context = new_context(budget)
    rehearse_tightest_plan(context)
    record, *_ = records(context)
    remember(context, FoldPlan.from_json(record["fold_plan"]), budget + 2_000)
    tighter = rehearse_tightest_plan(context)
    assert tighter.budget_bytes == record["predicted_peak_bytes"] - 2_000
    too_much, fits = records(context)
    assert too_much["measured_peak_bytes"] > budget >= fits["measured_peak_bytes"]
    # A run that has fallen back since searches the same plans, and rehearses no others.
    resumed = replace(context, memory_options=planner.memory_options)
    with limited(lambda: 0):
        assert rehearse_tightest_plan(resumed).budget_bytes == tighter.budget_bytes


def test_nothing_is_rehearsed_where_no_plan_comes_near_the_budget(new_context: NewContext) -> None:
    context = new_context(ABUNDANT)
    assert rehearse_tightest_plan(context) is context.planner
    assert files(context) == []


def test_what_no_level_makes_fit_is_a_shortage(
    planner: BudgetPlanner, new_context: NewContext
) -> None:
    plan = planner.minimum.plan
    context = new_context(planner.minimum.account.peak_bytes)
    remember(context, plan, planner.minimum.account.peak_bytes + 1)
    with pytest.raises(MemoryShortageError, match="budget") as caught:
        rehearse_plan(context, context.planner, plan)
    error = caught.value
    assert (error.where, error.step, error.plan, error.exit_code) == ("the rehearsal", 2, plan, 3)


def test_a_device_without_memory_is_a_shortage_that_leaves_nothing(
    planner: BudgetPlanner, new_context: NewContext
) -> None:
    plan, context = planner.uniform(1), new_context(ABUNDANT)
    limit = planner.accountant.account(plan).peak_bytes * 3 // 4
    with limited(lambda: limit), pytest.raises(MemoryShortageError) as caught:
        rehearse(context, plan)
    assert (caught.value.where, caught.value.step) == ("the rehearsal", 0)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert files(context) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), MemoryShortageError),
        (RuntimeError("something else"), RuntimeError),
    ],
)
def test_an_error_while_saving_leaves_nothing(
    error: Exception,
    expected: type[Exception],
    planner: BudgetPlanner,
    new_context: NewContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def save(_: Any, path: Path) -> None:
        path.write_text("half")
        raise error

    monkeypatch.setattr("lightning.pytorch.Trainer.save_checkpoint", save)
    context = new_context(ABUNDANT)
    with pytest.raises(expected):
        rehearse(context, planner.uniform(1))
    assert files(context) == []

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from foam_lightning.job import Job
from foam_lightning.memory.device import MemoryShortageError, Usage
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.run_folder import RunFolder
from tests.limited import limited
from tests.runs import open_folder
from tuner import rehearsal
from tuner.rehearsal import Rehearsal, rehearse


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = open_folder(tmp_path)
    folder.tuning.mkdir()
    return folder


@pytest.fixture
def go(job: Job, folder: RunFolder) -> Callable[..., Rehearsal]:
    def rehearsed(plan: FoldPlan, budget: int = 10**12) -> Rehearsal:
        return rehearse(job, plan, folder, predicted_bytes=5, budget_bytes=budget)

    return rehearsed


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.tuning.iterdir())


def test_it_measures_two_steps_an_evaluation_and_a_save_and_remembers(
    job: Job, folder: RunFolder, go: Callable[..., Rehearsal], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = job.plan_at(1)
    predicted = job.new_accountant().account(plan).peak_bytes
    found = go(plan)
    assert found.measured_peak_bytes == pytest.approx(predicted, rel=0.02)
    assert re.fullmatch(r"\d+(\.\d+)? [kM]B measured", str(found))
    kept = json.loads((folder.tuning / "rehearsal.json").read_text())
    assert kept["predicted_peak_bytes"] == 5
    assert names(folder) == ["rehearsal.json"]  # and no checkpoint
    measure = rehearsal._measure
    monkeypatch.setattr(rehearsal, "_measure", lambda *_: pytest.fail("it was remembered"))
    assert go(plan) == found
    monkeypatch.setattr(rehearsal, "_measure", measure)
    other = replace(
        plan,
        memory_options=replace(plan.memory_options, micro_batch_size=4, accumulate_grad_batches=2),
    )
    assert go(other).measured_peak_bytes < found.measured_peak_bytes


def test_on_a_gpu_it_says_what_was_allocated_and_reserved(
    folder: RunFolder,
    job: Job,
    go: Callable[..., Rehearsal],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = Usage(allocated=8_000_000_000, reserved=9_000_000_000, retries=2)
    monkeypatch.setattr(rehearsal, "_measure", lambda *_: Rehearsal(9_600_000_000, *usage))
    found = go(job.plan_at(1))
    assert str(found) == "9.6 GB measured (8 GB allocated, 9 GB reserved, 2 retries)"
    assert go(job.plan_at(1)) == found


def test_a_peak_above_the_budget_is_a_shortage(
    job: Job, folder: RunFolder, go: Callable[..., Rehearsal]
) -> None:
    plan = job.plan_at(1)
    with pytest.raises(MemoryShortageError) as caught:
        go(plan, budget=1_000)
    error = caught.value
    assert (error.where, error.step, error.plan, error.exit_code) == ("the rehearsal", 2, plan, 3)
    assert re.search(r"after step 2: it took \d.* [kM]B, the budget is 1 kB$", str(error))
    assert names(folder) == []


def test_a_device_without_memory_is_a_shortage_that_leaves_nothing(
    job: Job, folder: RunFolder, go: Callable[..., Rehearsal]
) -> None:
    plan = job.plan_at(1)
    limit = job.new_accountant().account(plan).peak_bytes * 3 // 4
    with limited(lambda: limit), pytest.raises(MemoryShortageError) as caught:
        go(plan)
    assert str(caught.value).startswith(
        "memory ran out in the rehearsal, after step 0: CUDA out of memory. Tried to allocate "
    )
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert names(folder) == []


def test_memory_that_runs_out_while_saving_leaves_nothing(
    job: Job, folder: RunFolder, go: Callable[..., Rehearsal], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(_: Any, path: Path) -> None:
        path.write_text("half")
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("lightning.pytorch.Trainer.save_checkpoint", save)
    with pytest.raises(MemoryShortageError, match="in the rehearsal, after step 2: CUDA"):
        go(job.plan_at(1))
    assert names(folder) == []


def test_another_error_stays_what_it_is(
    job: Job, go: Callable[..., Rehearsal], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr("lightning.pytorch.Trainer.save_checkpoint", fail)
    with pytest.raises(RuntimeError, match="something else"):
        go(job.plan_at(1))

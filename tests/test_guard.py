"""What happens when memory runs out all the same, piece by piece."""

import multiprocessing
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from foam_lightning.errors import ConfigError, MemoryFallbackError, PlanError
from foam_lightning.job import Job
from foam_lightning.memory.device import MemoryShortageError, Usage
from foam_lightning.plan import FoldPlan, MemoryOptions
from foam_lightning.storage.atomic import write_json
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.units import format_bytes
from tests.fake_gpu import FakeGpu
from tests.falling import Case, leftovers
from tuner.oom_fallback import Fallback, load_fallback_options, memory_fallback, restart_process
from tuner.planning.planner import BudgetPlanner

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One row a step: few rungs."""
    return Case(tmp_path_factory.mktemp("single"), "--data.batch_size=1")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.open(tmp_path, "run", "")


def short(plan: FoldPlan) -> MemoryShortageError:
    return MemoryShortageError("training", plan, 12, "CUDA out of memory")


def run_out(planner: BudgetPlanner, folder: RunFolder, plan: FoldPlan) -> str:
    with (
        pytest.raises((MemoryFallbackError, MemoryShortageError)) as caught,
        memory_fallback(planner, folder),
    ):
        raise short(plan)
    return str(caught.value)


def test_the_line_has_figures_and_price(
    tiny: Case, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu()
    gpu.taken = Usage(1, 23_000_000_000, 0)
    monkeypatch.setattr(Job, "gpu", gpu)
    plan = replace(tiny.plan, memory_options=tiny.second)
    line = run_out(tiny.planner, folder, plan)
    assert line == (
        "memory ran out in training, after step 12: CUDA out of memory (predicted "
        f"{format_bytes(tiny.peak(plan.memory_options))}, taken 23 GB); from here on "
        "micro-batches of 1 x 4 instead of 2 x 2 (price: none while a micro-batch still fills the "
        "device)"
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
    with memory_fallback(tiny.planner.with_budget(12 * 10**9), folder):
        assert gpu.asked == ["limit 0.5"]  # on a CPU there is no context
    assert gpu.asked == ["limit 0.5", "limit 1"]
    assert capfd.readouterr().out == ""
    with memory_fallback(tiny.planner.with_budget(25 * 10**9), folder):
        assert gpu.asked[2:] == ["limit 1"]
    warning = capfd.readouterr().out
    assert warning.startswith("the Fake 24 has 23.5 GB free of 24 GB, less than the budget of 25GB")
    assert len(warning.splitlines()) == 1


def test_every_shortage_goes_one_rung_further_and_is_remembered(
    single: Case, folder: RunFolder
) -> None:
    rungs = single.rungs()
    for at, rung in enumerate(rungs[:-1]):
        run_out(single.planner, folder, replace(single.plan, memory_options=rung))
        kept = Fallback.load(folder.fallback)
        assert kept is not None
        assert kept.memory_options == rungs[at + 1]
        assert len(kept.events) == at + 1
    assert kept is not None
    assert [event["step"] for event in kept.events] == [12] * (len(rungs) - 1)
    before = folder.fallback.read_bytes()
    line = run_out(single.planner, folder, replace(single.plan, memory_options=rungs[-1]))
    assert (
        f"no memory option is left after {len(rungs) - 1} fall-backs that needs less: lower" in line
    )
    assert folder.fallback.read_bytes() == before


def test_the_ninth_time_is_the_end(tiny: Case, folder: RunFolder) -> None:
    for _ in range(8):
        assert "from here on micro-batches of 2 x 2" in run_out(tiny.planner, folder, tiny.plan)
    assert "no memory option is left after 8 fall-backs" in run_out(tiny.planner, folder, tiny.plan)


def test_of_several_processes_whichever_runs_out_writes_it_down(
    tiny: Case, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    run_out(tiny.planner, folder, tiny.plan)
    assert load_fallback_options(folder) == tiny.second
    assert leftovers(folder.path) == []


def test_levers_that_the_settings_contradict_are_passed_over(
    tiny: Case, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Job, memory_options: MemoryOptions) -> None:
        if memory_options.micro_batch_size == 2:
            raise ConfigError("contradicts")

    monkeypatch.setattr(Job, "check", refuse)
    assert "micro-batches of 1 x 4 instead of 4 x 1" in run_out(tiny.planner, folder, tiny.plan)


def test_what_a_run_goes_on_with_is_said(
    folder: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    assert load_fallback_options(None) is load_fallback_options(folder) is None
    assert capfd.readouterr().out == ""
    memory_options = MemoryOptions(
        micro_batch_size=1,
        accumulate_grad_batches=4,
        activation_checkpointing=True,
        selective_checkpointing=True,
    )
    write_json(folder.fallback, {"memory_options": asdict(memory_options), "events": [{}, {}]})
    assert load_fallback_options(folder) == memory_options
    assert capfd.readouterr().out == (
        "memory ran out before (2x); going on with micro-batches of 1 x 4, activation "
        "checkpointing, selective checkpointing\n"
    )


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", '{"memory options": {"micro_batch_size": 1, "other": 2}, "events": []}'],
)
def test_a_damaged_record_is_one_line(folder: RunFolder, content: str) -> None:
    folder.fallback.write_text(content)
    with pytest.raises(PlanError, match=r"cannot read .*fallback\.json .*; delete it to") as caught:
        load_fallback_options(folder)
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
    restart_process()
    words = [sys.executable, "-X", "dev", "cli.py", "fit", "--name=a b"]
    assert executed == [(sys.executable, words)]
    worker.join(10)
    assert not worker.is_alive()  # nobody would wait for it any more


def test_one_of_several_processes_does_not_start_afresh(
    executed: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    restart_process()
    assert executed == []

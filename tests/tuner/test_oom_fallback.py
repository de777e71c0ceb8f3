"""What happens when memory runs out in spite of the plan."""

import multiprocessing
import os
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest

from foam_lightning.errors import ConfigError, MemoryFallbackError, PlanError
from foam_lightning.job import Job
from foam_lightning.memory.device import GpuUsage, MemoryShortageError
from foam_lightning.plan import FoldPlan, MemoryOptions
from foam_lightning.storage.atomic import write_json
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.storage.run_identity import RunIdentity
from foam_lightning.units import format_bytes
from tests.support.fake_gpu import FakeGpu
from tests.support.fallback_case import FallbackCase, leftovers
from tuner.oom_fallback import Fallback, fall_back_when_out_of_memory, restart_process
from tuner.planning.planner import BudgetPlanner
from tuner.run_context import load_fallback

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> FallbackCase:
    return FallbackCase(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> FallbackCase:
    """One row a step, so that few memory options are left."""
    return FallbackCase(tmp_path_factory.mktemp("single"), "--data.batch_size=1")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.open(tmp_path, "run", RunIdentity())


def run_out(planner: BudgetPlanner, folder: RunFolder, plan: FoldPlan) -> str:
    with (
        pytest.raises((MemoryFallbackError, MemoryShortageError)) as caught,
        fall_back_when_out_of_memory(planner, folder),
    ):
        raise MemoryShortageError("training", plan, 12, "CUDA out of memory")
    return str(caught.value)


def test_the_line_says_where_how_much_and_what_changes(
    tiny: FallbackCase, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu()
    gpu.taken = GpuUsage(1, 23_000_000_000, 0)
    monkeypatch.setattr(Job, "gpu", gpu)
    plan = replace(tiny.plan, memory_options=tiny.second)
    line = run_out(tiny.planner, folder, plan)
    predicted = format_bytes(tiny.peak(plan.memory_options))
    for part in ("in training, after step 12", predicted, "23 GB", "4 micro-batches of 1 instead"):
        assert part in line
    assert gpu.asked == []  # without a budget there is no cap


def test_a_budget_caps_the_memory_of_all_that_runs(
    tiny: FallbackCase,
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    gpu = FakeGpu()
    monkeypatch.setattr(Job, "gpu", gpu)
    with fall_back_when_out_of_memory(tiny.planner.with_budget(12 * 10**9), folder):
        assert gpu.asked == ["limit 0.5"]  # on a CPU there is no context
    assert gpu.asked == ["limit 0.5", "limit 1"]
    assert capfd.readouterr().out == ""
    with fall_back_when_out_of_memory(tiny.planner.with_budget(25 * 10**9), folder):
        assert gpu.asked[2:] == ["limit 1"]
    (warning,) = capfd.readouterr().out.splitlines()
    assert "25 GB" in warning


def test_every_shortage_takes_the_next_options_and_is_recorded(
    single: FallbackCase, folder: RunFolder
) -> None:
    options = single.options_in_order()
    for number, (before, after) in enumerate(pairwise(options), start=1):
        run_out(single.planner, folder, replace(single.plan, memory_options=before))
        fallback = Fallback.load(folder.fallback)
        assert fallback is not None
        assert fallback.memory_options == after
        assert [event["step"] for event in fallback.events] == [12] * number
    content = folder.fallback.read_bytes()
    line = run_out(single.planner, folder, replace(single.plan, memory_options=options[-1]))
    assert f"no memory options are left after {len(options) - 1} fall-backs" in line
    assert folder.fallback.read_bytes() == content


def test_a_run_falls_back_eight_times_at_most(tiny: FallbackCase, folder: RunFolder) -> None:
    for _ in range(8):
        assert "2 micro-batches of 2" in run_out(tiny.planner, folder, tiny.plan)
    assert "after 8 fall-backs" in run_out(tiny.planner, folder, tiny.plan)


def test_any_rank_that_runs_out_writes_the_record(
    tiny: FallbackCase, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    run_out(tiny.planner, folder, tiny.plan)
    assert load_fallback(folder) == tiny.second
    assert leftovers(folder.path) == []


def test_options_that_the_settings_contradict_are_skipped(
    tiny: FallbackCase, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Job, memory_options: MemoryOptions) -> None:
        if memory_options.micro_batch_size == 2:
            raise ConfigError("contradicts")

    monkeypatch.setattr(Job, "check_memory_options", refuse)
    assert "4 micro-batches of 1" in run_out(tiny.planner, folder, tiny.plan)


@pytest.mark.parametrize("key", ["memory_options", "levers"])  # the latter in older runs
def test_a_resumed_run_says_what_it_fell_back_to(
    key: str, folder: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    assert load_fallback(None) is load_fallback(folder) is None
    assert capfd.readouterr().out == ""
    options = MemoryOptions(
        micro_batch_size=1, accumulate_grad_batches=4, activation_checkpointing=True
    )
    write_json(folder.fallback, {key: asdict(options), "events": [{}, {}]})
    assert load_fallback(folder) == options
    said = capfd.readouterr().out
    for part in ("2 times", "4 micro-batches of 1", "activation checkpointing"):
        assert part in said


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", '{"memory_options": {"micro_batch_size": 1, "other": 2}, "events": []}'],
)
def test_a_damaged_record_is_one_line(folder: RunFolder, content: str) -> None:
    folder.fallback.write_text(content)
    with pytest.raises(PlanError, match=r"fallback\.json .*; delete it") as caught:
        load_fallback(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: calls.append((path, words)))
    monkeypatch.setattr(os, "set_inheritable", lambda *_: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return calls


def test_the_same_command_restarts_in_a_fresh_process(
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
    monkeypatch.setenv("LOCAL_RANK", "0")  # one of several cannot start on its own
    restart_process()
    assert len(executed) == 1

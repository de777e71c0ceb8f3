"""Callbacks of somebody's own: in a file beside the run, named in the settings and allowed."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback

import cli
from foam_lightning.checkpoint.load import read_checkpoint
from foam_lightning.errors import CheckpointError, ConfigError
from foam_lightning.job import Job
from foam_lightning.training import train
from tests.support.runs import STEPS, open_folder, small
from tests.support.tiny import write_settings
from tuner.config.parser import parse
from tuner.trials.runner import TrialRunner

MINE = '''
"""A package of somebody's own."""
from pathlib import Path
from lightning.pytorch import Callback

class CountSteps(Callback):
    def __init__(self, stop_at: int = -1, report: str = "report.txt") -> None:
        if stop_at == 0:
            raise ValueError("stop_at is 0,\\nwhich no step is")
        self.stop_at, self.report, self.steps = stop_at, Path(report), 0

    def on_train_start(self, *_):
        with self.report.open("a") as file:
            file.write(f"start {self.steps}\\n")

    def on_train_batch_end(self, *_):
        self.steps += 1
        if self.steps == self.stop_at and not Path("go").exists():
            raise RuntimeError("stopped by itself")

    def on_fit_end(self, *_):
        with self.report.open("a") as file:
            file.write(f"end {self.steps}\\n")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]

class NoCallback: ...
'''
pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself
ALLOWED = ("--allow-class-paths", "my_callbacks")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a configuration and a package of callbacks into a working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [one for one in sys.modules if one.startswith("my_callbacks")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "my_callbacks").mkdir()
    (tmp_path / "my_callbacks" / "counts.py").write_text(MINE, encoding="utf-8")
    (tmp_path / "my_callbacks" / "broken.py").write_text("x = = 1", encoding="utf-8")
    return write_settings(tmp_path)


def test_a_callback_in_the_working_directory_trains_and_resumes_with_its_state(
    settings: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    callback = "[{class_path: my_callbacks.counts.CountSteps, init_args: {stop_at: 11}}, Timer]"
    (tmp_path / "more.yaml").write_text(f"trainer: {{callbacks: {callback}}}")
    words = ["fit", "--config", str(settings), "--config", "more.yaml", *ALLOWED]
    assert cli.main(words) == 1
    run = tmp_path / "runs" / "default" / "version_0"
    error = capfd.readouterr().err
    assert "stopped by itself" in error
    assert str(run / "traceback.txt") in error
    (tmp_path / "go").touch()
    assert cli.main(words) == 0
    report = (tmp_path / "report.txt").read_text().splitlines()
    assert report == ["start 0", "start 10", "end 16"]  # the last checkpoint was of step 10


@pytest.mark.parametrize(
    "words",
    [
        ["my_callbacks.counts.CountSteps", "--trainer.callbacks.stop_at", "5"],
        ["[{class_path: my_callbacks.counts.CountSteps, init_args: {stop_at: 5}}, Timer]"],
        ["{class_path: my_callbacks.counts.CountSteps, init_args: {stop_at: 5}}"],
    ],
    ids=["alone", "list", "mapping"],
)
def test_a_callback_takes_arguments_on_the_command_line(settings: Path, words: list[str]) -> None:
    options = ["--config", str(settings), "--trainer.callbacks", *words, *ALLOWED]
    (first, *_) = parse("fit", options, default=None).job().trainer.callbacks
    assert vars(first)["stop_at"] == 5


@pytest.mark.parametrize(
    ("callback", "says"),
    [
        ("counts.CountSteps --trainer.callbacks.stop_at 0", "stop_at is 0"),
        ("counts.CountSteps --trainer.callbacks.stop 0", "stop"),
        ("counts.CountStep", "no attribute 'CountStep'"),
        ("counts.NoCallback", "subclass of Callback"),
        ("count.CountSteps", "no attribute 'count'"),
        ("broken.Any", "invalid syntax"),
    ],
)
def test_a_callback_that_cannot_be_made_is_one_short_line(
    callback: str, says: str, settings: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = f"fit --config {settings} --trainer.callbacks my_callbacks.{callback}".split()
    assert cli.main([*words, *ALLOWED]) == 2
    error = capfd.readouterr().err
    assert says in error
    assert "my_callbacks" in error
    assert error.count("\n") == 1
    assert len(error) < 200
    assert not (settings.parent / "runs").exists()


def test_where_a_module_that_is_missing_belongs_is_said(settings: Path) -> None:
    words = ["--trainer.callbacks", "my_missing.Mine", "--allow-class-paths", "my_missing"]
    with pytest.raises(ConfigError, match=r"my_missing.*working directory"):
        parse("fit", ["--config", str(settings), *words], default=None)


class Recorder(Callback):
    """Records what Lightning calls, and saves a state that is not plain."""

    def __init__(self, state: Any = None) -> None:
        self.calls: list[str] = []
        self.state = state

    def setup(self, *_: Any, **__: Any) -> None:
        self.calls.append("setup")

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.calls.append("step")

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "state": self.state}


def test_a_callback_takes_no_part_in_short_runs(new_job: Callable[..., Job]) -> None:
    recorder = Recorder()
    job = small(new_job, callbacks=[recorder])
    job.check_trainer()
    TrialRunner(job).run(job.configured_plan(), num_steps=2, seed=0)
    assert recorder.calls == []


def test_a_state_that_could_not_be_read_again_is_refused_and_the_last_checkpoint_stays(
    new_job: Callable[..., Job], tmp_path: Path
) -> None:
    recorder = Recorder()
    job = small(new_job, callbacks=[recorder])
    folder = open_folder(tmp_path)
    train(job, job.configured_plan(), folder)
    longer = small(new_job, callbacks=[Recorder(np.float64(1))], max_steps=STEPS + 8)
    with pytest.raises(CheckpointError, match="numpy"):
        train(longer, job.configured_plan(), folder)
    assert read_checkpoint(folder.last_checkpoint)["global_step"] == STEPS

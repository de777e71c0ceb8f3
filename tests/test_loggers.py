"""Loggers of Lightning beside TensorBoard, by name."""

import csv
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger, wandb

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.loggers import check_loggers
from foam_lightning.training import train
from tests.support.runs import StopAfter, StopError, open_folder, small
from tests.support.tiny import write_settings
from tuner.config.parser import parse


class FakeRun:
    """What `wandb.init` returns."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.name = self.id = "fake"
        self.config: Any = types.SimpleNamespace(update=lambda *_, **__: None)
        self.logged: list[dict[str, Any]] = []

    def log(self, metrics: dict[str, Any]) -> None:
        self.logged.append(metrics)


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """A package wandb that sends nothing, and the runs that were begun with it."""
    runs: list[FakeRun] = []

    def init(**arguments: Any) -> FakeRun:
        runs.append(FakeRun(**arguments))
        return runs[-1]

    modules = {
        "wandb": {"init": init, "run": None},
        "wandb.sdk": {},
        "wandb.sdk.lib": {"RunDisabled": type("RunDisabled", (), {})},
        "wandb.wandb_run": {"Run": type("Run", (), {})},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(wandb, "_WANDB_AVAILABLE", True)
    return runs


def test_every_logger_gets_the_curves_and_the_results_and_goes_on_when_resumed(
    new_job: Callable[..., Job], tmp_path: Path, wandb_runs: list[FakeRun]
) -> None:
    folder = open_folder(tmp_path)
    job = small(new_job, logger=["csv", "wandb", "tensorboard"])
    job.check_trainer()
    stopped = small(new_job, logger=["csv", "wandb"], callbacks=[StopAfter(9)])
    with pytest.raises(StopError):
        train(stopped, job.configured_plan(), folder)
    trained = train(job, job.configured_plan(), folder)

    first, second = sorted((folder.path / "csv").glob("*/metrics.csv"))
    texts = [path.read_text(encoding="utf-8").splitlines() for path in (first, second)]
    rows = [row for text in texts for row in csv.DictReader(text)]
    steps = {int(row["step"]) for row in rows if row.get("train/loss")}
    assert steps == set(range(17)), "no row is lost when a run is resumed"
    (result,) = [row for row in rows if row.get("final/validation_loss")]
    assert float(result["final/validation_loss"]) == pytest.approx(trained.final_validation_loss)
    began, went_on = wandb_runs
    assert began.arguments["id"] == went_on.arguments["id"]
    assert began.arguments["name"] == "run-version_0"
    assert any("validation/loss" in metrics for metrics in went_on.logged)
    assert list(folder.path.glob("events.out.tfevents*"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("wandb", "pip install wandb"),
        ("mlflow", "pip install mlflow"),
        ("comet", "pip install comet-ml"),
        ("[csv,mlflow]", "pip install mlflow"),
        ("false", "TensorBoard"),
        ("neptune", "'csv'"),
        ("lightning.pytorch.loggers.MLFlowLogger", "--allow-class-paths"),
        ("CSVLogger", "save_dir"),
    ],
)
def test_a_logger_that_cannot_work_is_refused_before_anything_is_trained(
    words: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foam_lightning.loggers.find_spec", lambda _: None)
    options = ["--config", str(write_settings(tmp_path)), "--trainer.logger", words]
    with pytest.raises(ConfigError) as caught:
        check_loggers(parse("fit", options, default=None).job().trainer.loggers)
    assert says in str(caught.value)


def test_a_logger_of_ones_own_is_made(tmp_path: Path, wandb_runs: list[FakeRun]) -> None:
    config = str(write_settings(tmp_path))
    mine = "lightning.pytorch.loggers.CSVLogger"
    arguments = f"{{class_path: {mine}, init_args: {{save_dir: {tmp_path}/mine}}}}"
    words = ["--config", config, "--trainer.logger", f"[csv, {arguments}]"]
    name, logger = parse("fit", words, default=None).job().trainer.loggers
    assert name == "csv"
    assert isinstance(logger, CSVLogger)
    mine = "lightning.pytorch.loggers.WandbLogger"
    words = ["--config", config, "--allow-class-paths", mine, "--trainer.logger", mine]
    words += ["--trainer.logger.project", "mine"]
    (logger,) = parse("fit", words, default=None).job().trainer.loggers
    assert isinstance(logger, WandbLogger)
    assert not wandb_runs, "nothing is sent before training"
    with pytest.raises(ConfigError, match="local"):
        check_loggers([CSVLogger("memory://away")])


def test_a_run_without_a_logger_has_the_settings_of_before_there_were_loggers(
    tmp_path: Path,
) -> None:
    config = ["--config", str(write_settings(tmp_path))]
    assert "logger:" not in parse("fit", config, default=None).text
    text = parse("fit", [*config, "--trainer.logger", "csv"], default=None).text
    assert "logger: csv" in text

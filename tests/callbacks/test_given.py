"""Callbacks that the settings name: alone or in a list, and tried before anything is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    Timer,
    device_stats_monitor,
)

from foam_lightning.callbacks.given import LOGGED
from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.training import train
from tests.support.runs import open_folder, small
from tests.support.tiny import write_settings
from tuner.config.allowed_classes import CALLBACKS
from tuner.config.parser import parse

STOPPING = ["EarlyStopping", "--trainer.callbacks.monitor", "validation/loss"]
GIVEN = {
    "EarlyStopping": STOPPING,
    "DeviceStatsMonitor": ["DeviceStatsMonitor"],
    "LearningRateMonitor": ["lightning.pytorch.callbacks.LearningRateMonitor"],
    "Timer": ["Timer", "--trainer.callbacks.duration", "00:01:00:00"],
}


@pytest.mark.parametrize("name", [one.__name__ for one in CALLBACKS])
@pytest.mark.parametrize("is_list", [False, True])
def test_every_callback_of_the_list_works_by_name_and_again_from_the_run_folder(
    name: str, is_list: bool, tmp_path: Path
) -> None:
    words = GIVEN[name]
    if is_list:
        arguments = "".join(f", init_args: {{monitor: {one}}}" for one in words[2:] if "/" in one)
        words = [f"[{{class_path: {words[0]}{arguments}}}]"]
    options = ["--config", str(write_settings(tmp_path)), "--trainer.callbacks", *words]
    settings = parse("fit", options, default=None)
    settings.job().check_trainer()
    written = tmp_path / "config.yaml"
    written.write_text(settings.text, encoding="utf-8")
    again = parse("fit", ["--config", str(written)], default=None)
    assert again.text == settings.text
    (callback,) = again.job().trainer.callbacks
    assert type(callback).__name__ == name


class Seen(Callback):
    """Collect the names of all metrics that a callback could monitor after an evaluation."""

    def __init__(self) -> None:
        self.names: list[set[str]] = []

    def on_validation_end(self, trainer: Trainer, _: Any) -> None:
        if trainer.state.fn == "fit":
            self.names.append(set(trainer.callback_metrics))


def test_what_may_be_monitored_is_logged_from_the_first_evaluation_on(
    new_job: Callable[..., Job], tmp_path: Path
) -> None:
    seen = Seen()
    job = small(new_job, callbacks=[seen, EarlyStopping("validation/loss", patience=50)])
    job.check_trainer()
    train(job, job.configured_plan(), open_folder(tmp_path))
    assert len(seen.names) > 1
    for names in seen.names:
        assert names >= set(LOGGED)


class Mine(Callback):
    """A callback of somebody's own, whose setup must not run before training."""

    monitor = "mine"

    def setup(self, *_: Any, **__: Any) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        (EarlyStopping("val_loss"), "did you mean validation/loss"),
        ([Timer(), EarlyStopping("loss")], "'loss'"),
        ([EarlyStopping("validation/loss"), EarlyStopping("validation/loss")], "EarlyStopping"),
        (EarlyStopping("lr-FOAM"), "lr-FOAM"),
    ],
)
def test_a_callback_that_cannot_work_is_refused_before_anything_is_trained(
    callbacks: Any, words: str, new_job: Callable[..., Job]
) -> None:
    with pytest.raises(ConfigError, match=words):
        new_job(trainer={"callbacks": callbacks}).check_trainer()


def test_two_limits_of_the_time_are_refused(new_job: Callable[..., Job]) -> None:
    job = new_job(trainer={"callbacks": Timer("00:01:00:00"), "max_time": "00:02:00:00"})
    with pytest.raises(ConfigError, match="max_time"):
        job.check_trainer()


def test_a_package_that_a_callback_lacks_is_named(
    new_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_job(trainer={"callbacks": [DeviceStatsMonitor()]})
    job.check_trainer()
    monkeypatch.setattr(device_stats_monitor, "_PSUTIL_AVAILABLE", False)
    with pytest.raises(ConfigError, match="psutil"):
        job.check_trainer()


def test_what_only_training_can_tell_is_not_refused(new_job: Callable[..., Job]) -> None:
    for callbacks in (
        [Mine(), EarlyStopping("what Mine may log")],
        [LearningRateMonitor(), EarlyStopping("lr-FOAM")],
    ):
        new_job(trainer={"callbacks": callbacks}).check_trainer()

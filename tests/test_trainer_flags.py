"""Every argument of Lightning's Trainer does what Lightning says, or is refused by name."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor, Timer
from lightning.pytorch.plugins.environments import LightningEnvironment

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.training import train
from tests.support.runs import STEPS, StopAfter, StopError, final_weights, open_folder, small
from tests.support.tiny import write_settings
from tuner.config.parser import parse

# Values that Lightning takes, what is refused by name, and what our own settings are for.
TAKEN: dict[str, tuple[Any, Callable[[Trainer], object]]] = {
    "accelerator": ("cpu", lambda t: type(t.accelerator).__name__ == "CPUAccelerator"),
    "strategy": ("auto", lambda t: type(t.strategy).__name__ == "SingleDeviceStrategy"),
    "devices": (1, lambda t: t.num_devices == 1),
    "num_nodes": (1, lambda t: t.num_nodes == 1),
    "precision": ("bf16-mixed", lambda t: t.precision == "bf16-mixed"),
    "logger": ("csv", lambda t: [type(x).__name__ for x in t.loggers][1:] == ["CSVLogger"]),
    "callbacks": (
        [DeviceStatsMonitor(), LearningRateMonitor()],
        lambda t: "LearningRateMonitor" in {type(x).__name__ for x in t.callbacks},
    ),
    "max_epochs": (50, lambda t: t.max_epochs == 50),
    "min_epochs": (1, lambda t: t.min_epochs == 1),
    "max_steps": (6, lambda t: t.global_step == 6),
    "min_steps": (2, lambda t: t.min_steps == 2),
    "max_time": ("00:01:00:00", lambda t: any(isinstance(x, Timer) for x in t.callbacks)),
    "limit_train_batches": (2, lambda t: t.num_training_batches == 2 * 2),  # micro-batches
    "limit_val_batches": (1, lambda t: t.num_val_batches == [1 * 2]),
    "val_check_interval": (1.0, lambda t: t.val_check_batch == 2 * 2),
    "check_val_every_n_epoch": (2, lambda t: t.check_val_every_n_epoch == 2),
    "num_sanity_val_steps": (1, lambda t: t.num_sanity_val_steps == 1),
    "log_every_n_steps": (3, lambda t: t.log_every_n_steps == 3),
    "enable_progress_bar": (False, lambda t: t.progress_bar_callback is None),
    "enable_model_summary": (
        True,
        lambda t: any(type(x).__name__ == "RichModelSummary" for x in t.callbacks),
    ),
    "gradient_clip_val": (0.5, lambda t: t.gradient_clip_val == 0.5),
    "gradient_clip_algorithm": ("value", lambda t: t.gradient_clip_algorithm == "value"),
    "deterministic": ("warn", lambda _: torch.is_deterministic_algorithms_warn_only_enabled()),
    "benchmark": (True, lambda _: torch.backends.cudnn.benchmark),
    "inference_mode": (False, lambda t: not t.validate_loop.inference_mode),
    "profiler": ("simple", lambda t: "optimizer_step" in t.profiler.summary()),
    "detect_anomaly": (True, lambda t: t._detect_anomaly),
    "plugins": (
        [LightningEnvironment()],
        lambda t: isinstance(t._accelerator_connector.cluster_environment, LightningEnvironment),
    ),
    "enable_autolog_hparams": (False, lambda t: t.enable_autolog_hparams is False),
}
REFUSED: dict[str, tuple[str, str]] = {
    "accumulate_grad_batches": ("4", "data.micro_batch_size"),
    "barebones": ("true", "leave it out"),
    "enable_checkpointing": ("false", "leave it out"),
    "fast_dev_run": ("true", "trainer.max_steps 2"),
    "limit_test_batches": ("1", "trainer.limit_val_batches"),
    "limit_predict_batches": ("1", "leave it out"),
    "overfit_batches": ("2", "data.files"),
    "use_distributed_sampler": ("false", "leave it out"),
    "sync_batchnorm": ("true", "leave it out"),
    "reload_dataloaders_every_n_epochs": ("1", "leave it out"),
    "default_root_dir": ("x", "--runs"),
    "model_registry": ("x", "hf/"),
}


class Watch(Callback):
    """Keep the trainer of the run."""

    def on_fit_end(self, trainer: Trainer, _: Any) -> None:
        self.trainer = trainer


@pytest.fixture
def _global_settings() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def test_every_parameter_is_taken_or_refused() -> None:
    parameters = set(inspect.signature(Trainer).parameters)
    assert parameters == TAKEN.keys() | REFUSED.keys()
    assert not TAKEN.keys() & REFUSED.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_global_settings")
def test_what_is_taken_reaches_lightning(
    new_job: Callable[..., Job], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    watch = Watch()
    arguments: dict[str, Any] = {name: value for name, (value, _) in TAKEN.items()}
    arguments["callbacks"] = [*arguments["callbacks"], watch]
    job = new_job(data={"micro_batch_size": 4}, trainer=arguments)
    job.check_trainer()
    folder = open_folder(tmp_path)
    train(job, job.configured_plan(), folder)
    for name, (value, is_set) in TAKEN.items():
        assert is_set(watch.trainer), f"{name} {value}"
    (curves,) = (folder.path / "csv").glob("*/metrics.csv")
    header = curves.read_text(encoding="utf-8").partition("\n")[0]
    assert "lr-FOAM" in header
    assert "DeviceStatsMonitor" in header
    assert "Total params" in capfd.readouterr().out
    assert "optimizer_step" in (folder.path / "fit-profile.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name: str, tmp_path: Path) -> None:
    value, words = REFUSED[name]
    options = ["--config", str(write_settings(tmp_path)), f"--trainer.{name}", value]
    with pytest.raises(ConfigError) as caught:
        parse("fit", options, default=None).job()
    assert f"trainer.{name}" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"gradient_clip_algorithm": "norm"}, "gradient_clip_val"),
        ({"val_check_interval": 5, "check_val_every_n_epoch": 2}, "check_val_every_n_epoch"),
        ({"accelerator": "tpu"}, "cpu, gpu"),
        ({"accelerator": "mps"}, "cpu, gpu"),
    ],
)
def test_a_combination_without_a_meaning_is_refused(
    trainer: dict[str, Any], words: str, new_job: Callable[..., Job]
) -> None:
    with pytest.raises(ConfigError, match=words):
        new_job(trainer=trainer)


def test_a_fraction_of_an_epoch_needs_its_length(new_job: Callable[..., Job]) -> None:
    job = new_job(data={"streaming": True}, trainer={"val_check_interval": 0.5})
    with pytest.raises(ConfigError, match=r"val_check_interval 0\.5"):
        job.check_trainer()


@pytest.mark.parametrize(
    "trainer",
    [
        {"val_check_interval": 0.5, "limit_train_batches": 6, "num_sanity_val_steps": 1},
        {"val_check_interval": 1.0, "limit_train_batches": 3, "check_val_every_n_epoch": 2},
    ],
)
def test_a_run_in_parts_of_epochs_resumes_exactly(
    trainer: dict[str, Any], new_job: Callable[..., Job], tmp_path: Path
) -> None:
    data = {"micro_batch_size": 4}
    job = new_job(data=data, trainer={**trainer, "max_steps": STEPS})
    stopped = job.trainer.replace(callbacks=[StopAfter(9)])
    plan, whole, broken = job.configured_plan(), *map(open_folder, (tmp_path / "1", tmp_path / "2"))
    train(job, plan, whole)
    with pytest.raises(StopError):
        train(replace(job, trainer=stopped), plan, broken)
    train(job, plan, broken)
    weights = final_weights(broken)
    for name, weight in final_weights(whole).items():
        assert torch.equal(weight, weights[name])


def test_short_runs_of_the_search_have_none_of_what_watches_the_full_run(
    new_job: Callable[..., Job],
) -> None:
    job = small(new_job, profiler="simple", detect_anomaly=True, callbacks=LearningRateMonitor())
    trainer = job.new_trainer(job.memory_options, [], bare=True)
    assert type(trainer.profiler).__name__ == "PassThroughProfiler"
    assert not trainer._detect_anomaly
    assert trainer.callbacks == []

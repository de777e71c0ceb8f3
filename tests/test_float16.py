"""Float16 mixed precision: the gradient scaler, what it excludes, and the names of precisions."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from foam_lightning.callbacks.memory import MemoryMonitor
from foam_lightning.callbacks.spike_guard import LIMITS, SpikeGuard, StepPolicy
from foam_lightning.errors import ConfigError, DivergedError
from foam_lightning.job import Job
from foam_lightning.memory.account import Accountant
from foam_lightning.plan import MemoryOptions
from foam_lightning.settings import TrainerSettings
from tests.support.planted import Plant
from tests.support.runs import NewJob
from tuner.config.parser import parse
from tuner.planning.planner import BudgetPlanner

PLAIN = MemoryOptions(micro_batch_size=8)
SMALL = {"micro_batch_size": 4, "accumulate_grad_batches": 2}


@pytest.fixture
def job(new_job: NewJob) -> Job:
    return float16_job(new_job)


def float16_job(new_job: NewJob, **trainer: Any) -> Job:
    arguments = {"accelerator": "auto", "precision": "16-mixed", "max_steps": 16, **trainer}
    return new_job(data={"sequence_length": 80}, trainer=arguments)


class Losses(Callback):
    """Record the loss of every step and set the first scale."""

    def __init__(self, scale: float | None = None) -> None:
        self.first_scale, self.last_scale = scale, math.nan
        self.losses: list[float] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.first_scale is not None:
            scaler = pl_module.gradient_scaler
            scaler.load_state_dict({**scaler.state_dict(), "scale": self.first_scale})

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        scaler = pl_module.gradient_scaler
        self.last_scale = math.nan if scaler is None else scaler.get_scale()


def fit(job: Job, options: MemoryOptions, *callbacks: Callback) -> None:
    module = job.new_module()
    module.set_plan(module.uniform_plan(2, options))
    trainer = job.new_trainer(options, callbacks, bare=True, limit_val_batches=0)
    trainer.fit(module, datamodule=job.new_data(options))


def guard(job: Job, tmp_path: Any, **limits: int) -> SpikeGuard:
    defaults = {key: getattr(job.model, key) for key in LIMITS}
    return SpikeGuard(StepPolicy(**{**defaults, **limits}), tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    ("given", "expected"),
    [("32", "32-true"), (16, "16-mixed"), ("bf16", "bf16-mixed"), ("bf16-true", "bf16-true")],
)
def test_a_short_name_of_a_precision_is_recorded_in_full(given: str | int, expected: str) -> None:
    assert TrainerSettings({"max_steps": 9, "precision": given}).precision == expected
    short, full = (
        parse("fit", ["--trainer.max_steps", "9", "--trainer.precision", str(name)], default=None)
        for name in (given, expected)
    )
    assert short.text == full.text
    assert f"precision: {expected}" in short.text


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"accelerator": "cpu"}, "GPU.* bf16-mixed or 32-true"),
        ({"strategy": "fsdp2", "devices": 2}, "fsdp2 .*use ddp"),
    ],
)
def test_where_float16_cannot_train_it_is_refused(
    new_job: NewJob, trainer: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        float16_job(new_job, **trainer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_a_gpu_does_not_train_in_another_precision(job: Job) -> None:
    with pytest.raises(ConfigError, match="this machine has none"):
        job.new_trainer(PLAIN, [])


def test_gradients_are_not_released_before_they_are_scaled_back(job: Job) -> None:
    with pytest.raises(ConfigError, match=r"model\.gradient_release"):
        job.check_memory_options(MemoryOptions(micro_batch_size=8, gradient_release=True))
    offered = BudgetPlanner(job, None).ladder.candidates_for_minimum()
    assert not any(options.gradient_release for options in offered)


@pytest.mark.usefixtures("float16_on_cpu")
def test_training_learns_and_a_chunked_loss_learns_the_same(job: Job) -> None:
    plain, chunked = Losses(), Losses()
    fit(job, MemoryOptions(**SMALL), plain)
    fit(job, MemoryOptions(**SMALL, chunked_loss=True), chunked)
    assert plain.last_scale == 2.0**16
    assert plain.losses[-1] < plain.losses[0] - 0.3
    assert chunked.losses == pytest.approx(plain.losses, abs=0.03)


@pytest.mark.usefixtures("float16_on_cpu")
@pytest.mark.parametrize(
    "options",
    [PLAIN, MemoryOptions(**SMALL, activation_checkpointing=True, chunked_loss=True)],
    ids=["plain", "lean"],
)
def test_the_account_counts_the_scaler(job: Job, options: MemoryOptions) -> None:
    memory = MemoryMonitor()
    fit(job, options, memory)
    module = job.new_module()
    accountant = Accountant(
        module, num_layers=2, sequence_length=80, precision="16-mixed", on_gpu=False
    )
    predicted = accountant.account(module.uniform_plan(2, options)).peak_bytes
    assert memory.measured_bytes is not None
    assert 1.0 <= predicted / memory.measured_bytes <= 1.01


@pytest.mark.usefixtures("float16_on_cpu")
def test_steps_that_overflow_are_skipped_and_counted_until_the_scale_fits(
    job: Job, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, watch = guard(job, tmp_path, max_skipped_steps=0), Losses(2.0**23)
    fit(job, PLAIN, ours, watch)
    assert 0 < ours.policy.skipped < 16
    assert watch.last_scale == 2.0 ** (23 - ours.policy.skipped)
    assert watch.losses[-1] < watch.losses[0] - 0.2
    assert "loss scale of 8.38861e+06" in capsys.readouterr().out


@pytest.mark.usefixtures("float16_on_cpu")
def test_a_model_that_diverges_still_stops(job: Job, tmp_path: Any) -> None:
    broken = Plant("gradient", tuple(range(30)))
    with pytest.raises(DivergedError, match="3 bad steps in a row"):
        fit(job, PLAIN, guard(job, tmp_path, max_skipped_steps=2), broken, Losses(4.0))

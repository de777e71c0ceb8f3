"""Runs with bad numbers in the middle: what is skipped, rolled back and stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import cli
from foam_lightning.callbacks.spike_guard import SpikeGuard, StepPolicy
from foam_lightning.errors import ConfigError, DivergedError
from foam_lightning.job import Job
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan
from foam_lightning.training import train
from tests.planted import Plant
from tests.runs import NewJob, open_folder
from tests.test_resumption import Steps
from tests.tiny import write_settings
from tuner.trials.runner import TrialRunner

NOWHERE = Path("/nowhere/last.ckpt")


class Watch(Callback):
    """Note the weights before every step, and at the end."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == len(self.weights):
            flat = [p.detach().flatten().clone() for p in module.parameters()]
            self.weights.append(torch.cat(flat))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.on_train_batch_start(trainer, module)


def spike_guard(skipped: int = 2) -> SpikeGuard:
    return SpikeGuard(
        StepPolicy(max_skipped_steps=skipped, spike_nats=1.0, max_rollbacks=0), NOWHERE
    )


def fit(job: Job, plan: FoldPlan, *callbacks: Callback) -> Trainer:
    module = job.new_module()
    module.follow(plan)
    trainer = job.new_trainer(plan.memory_options, list(callbacks), bare=True, limit_val_batches=0)
    trainer.fit(module, datamodule=job.new_data(plan.memory_options))
    return trainer


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16, int8": {"model": {"state_dtype": "int8"}, "trainer": {"precision": "bf16-true"}},
    "accumulated": {"data": {"micro_batch_size": 4}},
    "clipped": {"trainer": {"gradient_clip_val": 0.1}},
    "clipped each": {"model": {"clip_norm": 0.1}},
    "released": {"model": {"gradient_release": True}},
    "adamw": {"model": {"optimizer": "adamw"}},
    "muon": {"model": {"optimizer": "muon"}},
    "galore": {"model": {"optimizer": "galore"}},
    "adam_mini": {"model": {"optimizer": "adam_mini"}},
}


@pytest.mark.parametrize(
    ("way", "what"),
    # A gradient that is released is spent before it can be judged: see the next test.
    [*((way, "loss") for way in WAYS), *((way, "gradient") for way in WAYS if way != "released")],
)
def test_a_bad_step_changes_nothing_and_the_run_goes_on(
    way: str, what: str, new_job: NewJob
) -> None:
    job = new_job(**WAYS[way])
    watch, bad = Watch(), spike_guard()
    micro_batch = job.memory_options.accumulate_grad_batches - 1
    plant = Plant(what, (0, 3, 4), micro_batch=micro_batch)
    trainer = fit(job, job.plan_at(1), bad, plant, watch)
    changed = [
        not torch.equal(before, after)
        for before, after in zip(watch.weights, watch.weights[1:], strict=False)
    ]
    assert changed == [False, True, True, False, False, True, True, True]
    assert all(weights.isfinite().all() for weights in watch.weights)
    assert (bad.judge.skipped, bad.judge.in_a_row, trainer.global_step) == (3, 0, 8)
    steps = {int(s["step"]) for s in trainer.optimizers[0].state.values() if "step" in s}
    assert steps <= {5}


def test_released_gradients_that_are_not_finite_count_as_zero(new_job: NewJob) -> None:
    job = new_job(model={"gradient_release": True})
    watch, bad = Watch(), spike_guard()
    fit(job, job.plan_at(1), bad, Plant("gradient", (3,)), watch)
    assert all(weights.isfinite().all() for weights in watch.weights)
    assert (bad.judge.skipped, bad.judge.num_taken) == (1, 7)
    with pytest.raises(DivergedError, match=r"step 5, rows 33 to 40: the gradient of some param"):
        fit(job, job.plan_at(1), spike_guard(), Plant("gradient", range(2, 8)))


def test_a_run_without_bad_steps_is_the_same_with_and_without_a_judge(new_job: NewJob) -> None:
    job = new_job(data={"micro_batch_size": 4})
    runs = [Watch(), Watch()]
    fit(job, job.plan_at(1), runs[0])
    fit(job, job.plan_at(1), spike_guard(), runs[1])
    assert torch.equal(torch.stack(runs[0].weights), torch.stack(runs[1].weights))


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("loss", "the loss is nan"),
        ("gradient", "the gradient of model.model.layers.1.mlp.up_proj.weight is not finite"),
    ],
)
def test_too_many_in_a_row_stop_the_run_and_name_the_batch(
    what: str, found: str, new_job: NewJob, capfd: pytest.CaptureFixture[str]
) -> None:
    job = new_job()
    with pytest.raises(DivergedError) as caught:
        fit(job, job.plan_at(1), spike_guard(), Plant(what, range(3, 8)))
    assert str(caught.value) == (
        f"training stopped at step 6, rows 41 to 48: {found}, after 3 steps in a row "
        "(model.max_skipped_steps); it has no checkpoint; lower model.lr, look at these rows, or "
        "raise the limit"
    )
    assert caught.value.exit_code == 7
    assert f"skipped step 4, rows 25 to 32: {found}\n" in capfd.readouterr().out


def test_a_short_run_of_the_search_still_diverges(
    new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_job()
    run = TrialRunner(job).run(
        job.plan_at(1), num_steps=4, seed=0, callbacks=[Plant("gradient", (1,))]
    )
    assert run.loss != run.loss


# ---- whole runs


def spiking(new_job: NewJob, way: dict[str, Any], steps: range, rollbacks: int) -> Job:
    """Give a job that learns, and meets rows of nonsense after the given steps."""
    return new_job(
        model={"max_rollbacks": rollbacks, "max_skipped_steps": 3, **way.get("model", {})},
        data=way.get("data"),
        trainer={"max_steps": 40, "callbacks": [Plant("rows", steps), Steps(), Watch()]},
    )


def scalars(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("way", ["accumulated", "released"])
def test_a_spike_rolls_back_to_the_last_checkpoint_and_the_data_goes_on(
    way: str, new_job: NewJob, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calm = spiking(new_job, WAYS[way], range(0), 0)
    job = spiking(new_job, WAYS[way], range(32, 33), 2)
    folders = [open_folder(tmp_path / name) for name in ("calm", "spiked")]
    expected, trained = (
        train(one, job.plan_at(1), folder) for one, folder in zip((calm, job), folders, strict=True)
    )
    assert (trained.skipped_steps, trained.rollbacks) == (1, 1)
    _, calm_steps, calm_watch = calm.trainer["callbacks"]
    _, steps, watch = job.trainer.arguments["callbacks"]
    assert torch.equal(watch.weights[32], calm_watch.weights[32])
    # Checkpoints are every 5 steps: after step 33 the weights are those of step 30.
    assert torch.equal(watch.weights[33], watch.weights[30])
    assert not torch.equal(watch.weights[34], watch.weights[33])
    assert steps.rows == calm_steps.rows
    curves = [scalars(folder.path) for folder in folders]
    assert curves[1]["train/rollbacks"] == [0.0] * 32 + [1.0] * 8
    assert curves[1]["train/skipped_steps"] == curves[1]["train/rollbacks"]
    assert curves[1]["train/learning_rate"] == curves[0]["train/learning_rate"]
    assert trained.final_validation_loss < expected.final_validation_loss + 0.1
    said = capfd.readouterr().out
    assert "rolled back at step 33, rows 257 to 264, to the last checkpoint: the loss" in said


def test_spikes_without_end_stop_the_run_which_then_goes_on_from_its_checkpoint(
    new_job: NewJob, tmp_path: Path
) -> None:
    folder = open_folder(tmp_path)
    job = spiking(new_job, {}, range(32, 40), 2)
    message = r"stopped at step 35, .* 2 rollbacks \(model.max_rollbacks\); its last"
    with pytest.raises(DivergedError, match=message):
        train(job, job.plan_at(1), folder)
    trained = train(spiking(new_job, {}, range(34, 35), 2), job.plan_at(1), folder)
    assert (trained.skipped_steps, trained.rollbacks) == (1, 1)


@pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself
def test_the_command_line_stops_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.lr", "1e30", "--model.max_skipped_steps", "2"]
    assert cli.main(["fit", "--config", str(write_settings(tmp_path)), *words]) == 7
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: training stopped at step ")
    assert "after 3 steps in a row (model.max_skipped_steps); its last checkpoint is" in last
    assert not (tmp_path / "runs/default/version_0/summary.json").exists()


@pytest.mark.parametrize(
    "setting", [{"max_skipped_steps": -1}, {"max_rollbacks": -1}, {"spike_nats": 0.0}]
)
def test_limits_that_are_none_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{next(iter(setting))} must be .*, got"):
        LlamaFoam(**setting)

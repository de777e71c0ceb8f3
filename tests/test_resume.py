"""Going on from the checkpoint of another run, with other settings."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from foam_lightning.checkpoint.load import read_checkpoint
from foam_lightning.errors import CheckpointError, ConfigError
from foam_lightning.job import Job
from foam_lightning.optim.schedule import learning_rate_factor
from foam_lightning.resume import resume_plan
from foam_lightning.training import train
from tests.support.runs import STEPS, Finished, open_folder

MORE = 8
# The interval of checkpoints, by which Lightning tells them apart, follows the length of the run.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def longer(job: Job, **model: Any) -> Job:
    trainer = job.trainer.replace(max_steps=STEPS + MORE)
    return replace(job, trainer=trainer, model=replace(job.model, **model))


def factor_of(job: Job) -> Callable[[int], float]:
    return learning_rate_factor(
        job.trainer.max_steps,
        schedule=job.model.schedule,
        warmup_fraction=job.model.warmup_fraction,
        decay_fraction=job.model.decay_fraction,
        final_fraction=job.model.final_lr_fraction,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lr": 0.001, "weight_decay": 0.5, "betas": (0.5, 0.6), "eps": 1e-6},
        {"residual_scale": 0.5, "clip_norm": 2.0, "stochastic_rounding": False},
        {"warmup_fraction": 0.5, "final_lr_fraction": 0.5, "schedule": "linear"},
    ],
    ids=lambda changes: ", ".join(changes) or "nothing",
)
def test_what_may_change_changes_and_is_recorded(
    finished: Finished, tmp_path: Path, changes: dict[str, Any]
) -> None:
    start = finished.folder.last_checkpoint
    job, folder = longer(finished.job, **changes), open_folder(tmp_path)
    resumed = resume_plan(job, start)
    assert resumed.step == STEPS
    assert [text.split()[0] for text in resumed.changes] == [
        f"model.{name}" for name in vars(job.model) if name in changes
    ]
    train(job, resumed.plan, folder, ckpt_path=start)

    content = read_checkpoint(folder.last_checkpoint)
    factor = factor_of(job)
    of_group = ("betas", "eps", "residual_scale", "clip_norm", "stochastic_rounding")
    for group in content["optimizer_states"][0]["param_groups"]:
        assert group["initial_lr"] == job.model.lr
        assert group["lr"] == job.model.lr * factor(STEPS + MORE)
        assert {name: group[name] for name in of_group} == {
            name: getattr(job.model, name) for name in of_group
        }
        assert group["weight_decay"] == (job.model.weight_decay if group["level"] else 0)
    recorded = yaml.unsafe_load((folder.path / "hparams.yaml").read_text())
    for name, value in changes.items():
        assert content["hyper_parameters"][name] == value == recorded[name]
    assert recorded["lr"] == job.model.lr


def test_the_first_step_has_the_learning_rate_of_the_new_schedule(
    finished: Finished, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job, folder = longer(finished.job, lr=0.002), open_folder(tmp_path)
    start = finished.folder.last_checkpoint
    train(job, resume_plan(job, start).plan, folder, ckpt_path=start)
    events = EventAccumulator(str(folder.path)).Reload().Scalars("train/learning_rate")
    factor = factor_of(job)
    expected = [0.002 * factor(step) for step in range(STEPS, STEPS + MORE)]
    assert [event.value for event in events] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("level", 3), ("scale", 0.5), ("unfolded_scale", 0.2), ("exclude", "lm_head")),
        *(("second_moment", "square_mean"), ("state_dtype", "bfloat16"), ("optimizer", "adamw")),
    ],
)
def test_what_may_not_change_is_refused_with_both_values(
    finished: Finished, name: str, value: Any
) -> None:
    job = longer(finished.job, **{name: value})
    before = str(getattr(finished.job.model, name))
    with pytest.raises(CheckpointError, match=f"model.{name} is {value}") as refused:
        resume_plan(job, finished.folder.last_checkpoint)
    assert f"--model.{name} {before}," in str(refused.value)


@pytest.mark.parametrize("max_steps", [STEPS, 6])
def test_a_checkpoint_at_or_past_the_end_leaves_nothing_to_train(
    finished: Finished, max_steps: int
) -> None:
    path = finished.folder.last_checkpoint
    resumed = resume_plan(finished.job, path)
    resumed.check_steps_left(path, STEPS + 1)
    with pytest.raises(ConfigError, match=rf"step {STEPS}\b.*step {max_steps}\b.*max_steps"):
        resumed.check_steps_left(path, max_steps)


def test_a_tuned_rate_stays_unless_another_is_asked_for(finished: Finished, tmp_path: Path) -> None:
    import torch

    content = read_checkpoint(finished.folder.last_checkpoint)
    tuned = replace(finished.plan, lr=0.0123)
    torch.save({**content, "fold_plan": tuned.to_json()}, tmp_path / "tuned.ckpt")
    assert resume_plan(longer(finished.job), tmp_path / "tuned.ckpt").plan.lr == 0.0123
    job = longer(finished.job, lr=0.003)
    assert resume_plan(job, tmp_path / "tuned.ckpt").plan.lr == 0.003


def test_a_plan_beside_a_checkpoint_counts_or_is_refused(
    finished: Finished, tmp_path: Path
) -> None:
    path, start = tmp_path / "plan.json", finished.folder.last_checkpoint
    scales = dict.fromkeys(finished.plan.scales, 0.125)
    given = replace(finished.plan, lr=0.004, scales=scales)
    given.save(path)
    assert resume_plan(longer(finished.job), start, str(path)).plan == given
    finished.job.uniform_plan(3).save(path)
    with pytest.raises(CheckpointError, match="levels differ"):
        resume_plan(longer(finished.job), start, str(path))


def test_the_memory_options_of_the_settings_count_unless_a_budget_chose_them(
    finished: Finished,
) -> None:
    start = finished.folder.last_checkpoint
    job = longer(finished.job, gradient_release=True)
    job = replace(job, data=replace(job.data, micro_batch_size=8))
    options = resume_plan(job, start).plan.memory_options
    assert (options.micro_batch_size, options.accumulate_grad_batches) == (8, 1)
    assert options.gradient_release
    kept = resume_plan(job, start, is_budgeted=True)
    assert kept.plan.memory_options == finished.plan.memory_options
    assert not kept.changes


@pytest.mark.parametrize("was_on", [False, True])
def test_offloaded_gradients_come_and_go_with_gradient_release(
    finished: Finished, tmp_path: Path, was_on: bool
) -> None:
    import torch

    start = tmp_path / "start.ckpt"
    content = read_checkpoint(finished.folder.last_checkpoint)
    options = replace(finished.plan.memory_options, gradient_release=was_on, grad_offload=was_on)
    settings = {**content["hyper_parameters"], "grad_offload": was_on}
    plan = replace(finished.plan, memory_options=options).to_json()
    torch.save({**content, "fold_plan": plan, "hyper_parameters": settings}, start)
    job = longer(finished.job, grad_offload=not was_on)
    job = replace(job, trainer=job.trainer.replace(accelerator="gpu"))
    found = resume_plan(job, start).plan.memory_options
    assert found.accumulate_grad_batches > 1
    assert (found.gradient_release, found.grad_offload) == (not was_on, not was_on)

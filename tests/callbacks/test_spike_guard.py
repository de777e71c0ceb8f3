"""Steps with a bad loss or gradient are skipped or rolled back, or stop the run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import cli
from foam_lightning.callbacks.spike_guard import LIMITS, SpikeGuard, StepAction, StepPolicy
from foam_lightning.errors import ConfigError, DivergedError
from foam_lightning.job import Job
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan
from foam_lightning.training import train
from tests.support.planted import Plant
from tests.support.resumed import Rows
from tests.support.runs import NewJob, open_folder
from tests.support.tiny import write_settings
from tuner.trials.runner import TrialRunner

TAKE, SKIP, ROLL_BACK, STOP = StepAction
NAN = math.nan


def new_policy(skipped: int = 2, rollbacks: int = 0) -> StepPolicy:
    return StepPolicy(max_skipped_steps=skipped, spike_nats=1.0, max_rollbacks=rollbacks)


def decide(
    policy: StepPolicy, losses: list[float], *, finite: bool = True, back: bool = True
) -> list[StepAction]:
    return [policy.decide(x, has_finite_gradients=finite, can_roll_back=back) for x in losses]


def settled(rollbacks: int) -> StepPolicy:
    """A policy whose running mean is 3 nats."""
    policy = new_policy(rollbacks=rollbacks)
    assert decide(policy, [3.0] * 20) == [TAKE] * 20
    return policy


@pytest.mark.parametrize("loss", [NAN, math.inf, -math.inf])
def test_one_bad_step_in_a_row_more_than_the_limit_stops(loss: float) -> None:
    assert decide(new_policy(), [2.0, loss, loss, loss]) == [TAKE, SKIP, SKIP, STOP]
    assert decide(new_policy(), [loss, loss, 2.0, loss, loss]) == [SKIP, SKIP, TAKE, SKIP, SKIP]
    assert decide(new_policy(skipped=0), [loss]) == [STOP]
    again = [SKIP, SKIP, ROLL_BACK, SKIP, SKIP, STOP]
    assert decide(new_policy(rollbacks=1), [loss] * 6) == again


def test_a_gradient_that_is_not_finite_counts_like_such_a_loss() -> None:
    policy = new_policy()
    assert decide(policy, [2.0, 2.0, 2.0], finite=False) == [SKIP, SKIP, STOP]
    assert (policy.skipped, policy.num_taken) == (3, 0)


def test_a_spike_rolls_back_up_to_the_limit_if_there_is_a_checkpoint() -> None:
    policy = settled(rollbacks=2)
    assert policy.mean == pytest.approx(3.0)
    expected = [TAKE, ROLL_BACK, TAKE, ROLL_BACK, TAKE, STOP]
    assert decide(policy, [3.9, 4.2, 3.0, 4.2, 3.0, 4.2]) == expected
    assert (policy.skipped, policy.rollbacks) == (3, 2)
    assert decide(settled(rollbacks=1), [9.0] * 3, back=False) == [SKIP, SKIP, STOP]


def test_there_are_no_spikes_without_rollbacks_or_before_the_mean_is_known() -> None:
    assert decide(settled(rollbacks=0), [30.0]) == [TAKE]
    assert decide(new_policy(rollbacks=1), [3.0] * 19 + [30.0]) == [TAKE] * 20


def test_the_mean_follows_the_last_steps_without_spikes() -> None:
    policy = settled(rollbacks=1)
    decide(policy, [2.0] * 400 + [9.0])
    assert policy.mean == pytest.approx(2.0, abs=0.01)


@given(
    st.lists(st.sampled_from([2.0, 3.0, 9.0, NAN]), max_size=60),
    st.integers(0, 60),
    st.integers(0, 3),
)
def test_a_policy_with_restored_counts_decides_like_the_first(
    losses: list[float], cut: int, rollbacks: int
) -> None:
    whole, before, after = (new_policy(rollbacks=rollbacks) for _ in range(3))
    expected = decide(whole, losses)
    found = decide(before, losses[:cut])
    state: dict[str, Any] = json.loads(json.dumps(before.state_dict()))
    assert not state.keys() & set(LIMITS)
    after.load_state_dict(state)
    assert found + decide(after, losses[cut:]) == expected
    assert after.skipped == sum(action is not TAKE for action in expected)


# ---- the callback


class Weights(Callback):
    """Record the weights before every step, and at the end."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == len(self.weights):
            flat = [p.detach().flatten().clone() for p in module.parameters()]
            self.weights.append(torch.cat(flat))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.on_train_batch_start(trainer, module)


def new_guard() -> SpikeGuard:
    return SpikeGuard(new_policy(), Path("/nowhere/last.ckpt"))


def fit(job: Job, plan: FoldPlan, *callbacks: Callback) -> Trainer:
    module = job.new_module()
    module.set_plan(plan)
    trainer = job.new_trainer(plan.memory_options, list(callbacks), bare=True, limit_val_batches=0)
    trainer.fit(module, datamodule=job.new_data(plan.memory_options))
    return trainer


SETTINGS: dict[str, dict[str, Any]] = {
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
    ("name", "what"),
    # A released gradient is used before the decision: see the next test.
    [(name, what) for name in SETTINGS for what in ("loss", "gradient")
     if (name, what) != ("released", "gradient")],
)  # fmt: skip
def test_a_bad_step_changes_no_weights_and_the_run_continues(
    name: str, what: str, new_job: NewJob
) -> None:
    job = new_job(**SETTINGS[name])
    recorded, guard = Weights(), new_guard()
    micro_batch = job.memory_options.accumulate_grad_batches - 1
    trainer = fit(
        job, job.uniform_plan(1), guard, Plant(what, (0, 3, 4), micro_batch=micro_batch), recorded
    )
    pairs = zip(recorded.weights, recorded.weights[1:], strict=False)
    changed = [not torch.equal(before, after) for before, after in pairs]
    assert changed == [False, True, True, False, False, True, True, True]
    assert all(weights.isfinite().all() for weights in recorded.weights)
    assert (guard.policy.skipped, guard.policy.in_a_row, trainer.global_step) == (3, 0, 8)
    steps = {int(s["step"]) for s in trainer.optimizers[0].state.values() if "step" in s}
    assert steps <= {5}


def test_released_gradients_that_are_not_finite_become_zero(new_job: NewJob) -> None:
    job = new_job(model={"gradient_release": True})
    recorded, guard = Weights(), new_guard()
    fit(job, job.uniform_plan(1), guard, Plant("gradient", (3,)), recorded)
    assert all(weights.isfinite().all() for weights in recorded.weights)
    assert (guard.policy.skipped, guard.policy.num_taken) == (1, 7)
    with pytest.raises(DivergedError, match=r"step 5, rows 33 to 40"):
        fit(job, job.uniform_plan(1), new_guard(), Plant("gradient", range(2, 8)))


def test_a_run_without_bad_steps_is_the_same_with_and_without_a_guard(new_job: NewJob) -> None:
    job = new_job(data={"micro_batch_size": 4})
    runs = [Weights(), Weights()]
    fit(job, job.uniform_plan(1), runs[0])
    fit(job, job.uniform_plan(1), new_guard(), runs[1])
    assert torch.equal(torch.stack(runs[0].weights), torch.stack(runs[1].weights))


@pytest.mark.parametrize(
    ("what", "problem"),
    [("loss", "the loss is nan"), ("gradient", "model.layers.1.mlp.up_proj.weight")],
)
def test_too_many_bad_steps_in_a_row_stop_the_run_and_name_the_rows(
    what: str, problem: str, new_job: NewJob, capfd: pytest.CaptureFixture[str]
) -> None:
    job = new_job()
    with pytest.raises(DivergedError, match=r"step 6, rows 41 to 48") as caught:
        fit(job, job.uniform_plan(1), new_guard(), Plant(what, range(3, 8)))
    for words in (problem, "3 bad steps in a row", "model.max_skipped_steps", "model.lr"):
        assert words in str(caught.value)
    assert caught.value.exit_code == 7
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "step 4" in line]
    assert line.startswith("skipped step 4, rows 25 to 32: ")
    assert problem in line


def test_a_short_run_of_the_search_still_diverges(new_job: NewJob) -> None:
    job = new_job()
    run = TrialRunner(job).run(
        job.uniform_plan(1), num_steps=4, seed=0, callbacks=[Plant("gradient", (1,))]
    )
    assert math.isnan(run.loss)


# ---- whole runs


def spiking(new_job: NewJob, settings: dict[str, Any], steps: range, rollbacks: int) -> Job:
    """A job that learns, and gets rows of nonsense after the given steps."""
    return new_job(
        model={"max_rollbacks": rollbacks, "max_skipped_steps": 3, **settings.get("model", {})},
        data=settings.get("data"),
        trainer={"max_steps": 40, "callbacks": [Plant("rows", steps), Rows(), Weights()]},
    )


def scalars(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("name", ["accumulated", "released"])
def test_a_spike_rolls_back_to_the_last_checkpoint_and_the_data_goes_on(
    name: str, new_job: NewJob, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = spiking(new_job, SETTINGS[name], range(0), 0)
    job = spiking(new_job, SETTINGS[name], range(32, 33), 2)
    folders = [open_folder(tmp_path / run) for run in ("plain", "spiked")]
    expected, trained = (
        train(one, job.uniform_plan(1), folder)
        for one, folder in zip((plain, job), folders, strict=True)
    )
    assert (trained.skipped_steps, trained.rollbacks) == (1, 1)
    (_, plain_steps, plain_weights), (_, steps, recorded) = (
        one.trainer.arguments["callbacks"] for one in (plain, job)
    )
    assert torch.equal(recorded.weights[32], plain_weights.weights[32])
    # Checkpoints are every 5 steps: after step 33 the weights are those of step 30.
    assert torch.equal(recorded.weights[33], recorded.weights[30])
    assert not torch.equal(recorded.weights[34], recorded.weights[33])
    assert steps.rows == plain_steps.rows
    curves = [scalars(folder.path) for folder in folders]
    assert curves[1]["train/rollbacks"] == [0.0] * 32 + [1.0] * 8
    assert curves[1]["train/skipped_steps"] == curves[1]["train/rollbacks"]
    assert curves[1]["train/learning_rate"] == curves[0]["train/learning_rate"]
    assert trained.final_validation_loss < expected.final_validation_loss + 0.1
    assert "rolled back at step 33, rows 257 to 264" in capfd.readouterr().out


def test_spikes_without_end_stop_the_run_which_then_resumes_from_its_checkpoint(
    new_job: NewJob, tmp_path: Path
) -> None:
    folder = open_folder(tmp_path)
    job = spiking(new_job, {}, range(32, 40), 2)
    with pytest.raises(DivergedError, match=r"step 35, .* 2 rollbacks \(model.max_rollbacks\)"):
        train(job, job.uniform_plan(1), folder)
    trained = train(spiking(new_job, {}, range(34, 35), 2), job.uniform_plan(1), folder)
    assert (trained.skipped_steps, trained.rollbacks) == (1, 1)


@pytest.mark.filterwarnings("ignore")  # the command line silences libraries itself
def test_the_command_line_stops_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.lr", "1e30", "--model.max_skipped_steps", "2"]
    assert cli.main(["fit", "--config", str(write_settings(tmp_path)), *words]) == 7
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: training stopped at step ")
    assert "the last checkpoint is from before" in last
    assert not (tmp_path / "runs/default/version_0/summary.json").exists()


@pytest.mark.parametrize("setting", ["max_skipped_steps", "max_rollbacks", "spike_nats"])
def test_limits_out_of_range_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{setting} must be .*, got"):
        LlamaFoam(**{setting: -1})

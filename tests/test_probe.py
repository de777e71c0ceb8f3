from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from foam_lightning.job import Job
from foam_lightning.module import LlamaFoam
from foam_lightning.optim.foam import FOAM
from foam_lightning.optim.fold import fold
from foam_lightning.plan import FoldPlan
from foam_lightning.roles import ROLES, role_of
from tuner.objective import Bench
from tuner.probe import LEVELS, UpdateProbe

AT_STEP = 4


class Witness(Callback):
    """Keep what the optimizer saw at one step, and what it did."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.updates: dict[str, Tensor] = {}
        self.rate = 0.0

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Any
    ) -> None:
        if trainer.global_step == AT_STEP and isinstance(module, LlamaFoam) and module.model:
            for name, parameter in module.model.named_parameters():
                state = optimizer.state[parameter]
                assert parameter.grad is not None
                self.before[name] = parameter.detach().clone()
                self.gradients[name] = parameter.grad.clone()
                self.moments[name] = (state["exp_avg"].clone(), state["exp_avg_sq"].clone())
            self.rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == AT_STEP + 1 and isinstance(module, LlamaFoam) and module.model:
            for name, parameter in module.model.named_parameters():
                self.updates[name] = self.before[name] - parameter.detach()


def at_scale_1(plan: FoldPlan) -> FoldPlan:
    return replace(plan, scales=dict.fromkeys(plan.levels, 1.0))


@pytest.fixture(scope="module")
def probed(new_job: Callable[..., Job]) -> tuple[Job, UpdateProbe, Witness]:
    job = new_job()
    # At scale 1 and without decay, the change of the weights over lr is the direction itself.
    plan = at_scale_1(job.plan_at(0))
    probe, witness = UpdateProbe(AT_STEP), Witness()
    Bench(job).run(plan, num_steps=6, seed=0, callbacks=[probe, witness])
    return job, probe, witness


@pytest.mark.parametrize("model", [{"clip_norm": 1e-3}, {"state_dtype": "int8"}], ids=str)
def test_the_probe_sees_what_the_optimizer_makes_of_gradient_and_state(
    new_job: Callable[..., Job], model: dict[str, Any]
) -> None:
    job = new_job(model=model)
    plan = at_scale_1(job.plan_at(0))
    probe, witness = UpdateProbe(AT_STEP), Witness()
    Bench(job).run(plan, num_steps=6, seed=0, callbacks=[probe, witness])
    expected = rms_by_role({n: u / witness.rate for n, u in witness.updates.items()})
    for role in ROLES:
        assert probe.rms[role][0] == pytest.approx(expected[role], rel=1e-3)


@pytest.mark.parametrize(
    "model", [{"second_moment": "square_mean"}, {"gradient_release": True}], ids=str
)
def test_what_cannot_be_measured_is_left_empty(
    new_job: Callable[..., Job], model: dict[str, Any]
) -> None:
    job = new_job(model=model)
    probe = UpdateProbe(AT_STEP)
    Bench(job).run(job.plan_at(0), num_steps=6, seed=0, callbacks=[probe])
    assert probe.rms == {}


def rms_by_role(updates: dict[str, Tensor]) -> dict[str, float]:
    return {
        role: float(
            torch.cat([u.flatten() for n, u in updates.items() if role_of(n) == role])
            .square()
            .mean()
            .sqrt()
        )
        for role in ROLES
    }


def test_level_0_is_the_update_that_adam_took(probed: tuple[Job, UpdateProbe, Witness]) -> None:
    _, probe, witness = probed
    assert list(probe.rms) == list(ROLES)
    expected = rms_by_role({n: u / witness.rate for n, u in witness.updates.items()})
    for role in ROLES:
        assert probe.rms[role][0] == pytest.approx(expected[role], rel=1e-3)


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_a_step_of_foam_from_folded_moments(
    probed: tuple[Job, UpdateProbe, Witness], level: int
) -> None:
    job, probe, witness = probed
    updates = {}
    for name in job.new_module().foldable:
        parameter = torch.nn.Parameter(torch.zeros_like(witness.before[name]))
        parameter.grad = witness.gradients[name]
        optimizer = FOAM([parameter], lr=1.0, level=level, scale=1.0)
        mean, square = witness.moments[name]
        optimizer.state[parameter] = {
            "step": AT_STEP,
            "exp_avg": fold(mean, level).clone(),
            "exp_avg_sq": fold(square, level).clone(),
        }
        optimizer.step()
        updates[name] = -parameter.detach()
    expected = rms_by_role(updates)
    for role in ROLES:
        assert probe.rms[role][level] == pytest.approx(expected[role], rel=1e-4)


def test_the_probe_changes_nothing(probed: tuple[Job, UpdateProbe, Witness]) -> None:
    job, _, _ = probed
    plan = job.plan_at(0)
    watched = Bench(job).run(plan, num_steps=6, seed=0, callbacks=[UpdateProbe(AT_STEP)])
    assert watched == Bench(job).run(plan, num_steps=6, seed=0)


def test_before_its_step_the_probe_knows_nothing(job: Job) -> None:
    probe = UpdateProbe(at_step=99)
    Bench(job).run(job.plan_at(0), num_steps=2, seed=0, callbacks=[probe])
    assert probe.rms == {}

"""Skip optimizer steps whose loss or gradient is not finite, and roll back after loss spikes."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from foam_lightning.distributed.fsdp import local_shard
from foam_lightning.errors import DivergedError
from foam_lightning.module import LlamaFoam

# A spike is a loss above the mean of the last steps, once there are enough of them.
_STEPS_OF_MEAN = 50
_STEPS_BEFORE_SPIKES = 20

# The fields of a policy that are settings of the model; the others are counts.
LIMITS = ("max_skipped_steps", "spike_nats", "max_rollbacks")


class StepAction(Enum):
    """What to do with a step."""

    TAKE = auto()
    SKIP = auto()
    ROLL_BACK = auto()
    STOP = auto()


@dataclass(kw_only=True)
class StepPolicy:
    """Decide about every step by its loss and by whether its gradients are finite.

    A step with a loss or gradient that is not finite is skipped. After too many in a row the run
    rolls back to its last checkpoint, if allowed, or stops. A spike, a finite loss far above the
    mean of the steps before, rolls back at once; without rollbacks there are no spikes.

    Attributes:
        max_skipped_steps: The most steps in a row to skip; at one more, the run rolls back or
            stops.
        spike_nats: A loss this far above the running mean, in nats per token, is a spike.
        max_rollbacks: The most rollbacks of the run; 0 disables spikes.
        skipped: Steps skipped so far, including those of rollbacks.
        rollbacks: Rollbacks so far.
        in_a_row: Steps skipped since the last good one.
        mean: The running mean of the loss, in nats per token.
        num_taken: Good steps so far.
    """

    max_skipped_steps: int
    spike_nats: float
    max_rollbacks: int
    skipped: int = 0
    rollbacks: int = 0
    in_a_row: int = 0
    mean: float = 0.0
    num_taken: int = 0

    def is_good(self, loss: float) -> bool:
        """Return whether a loss is finite and not a spike."""
        has_mean = self.max_rollbacks > 0 and self.num_taken >= _STEPS_BEFORE_SPIKES
        return math.isfinite(loss) and not (has_mean and loss > self.mean + self.spike_nats)

    def decide(
        self,
        loss: float,
        *,
        has_finite_gradients: bool,
        can_roll_back: bool,
        lowers_scale: bool = False,
    ) -> StepAction:
        """Decide about a step, and count it.

        Args:
            loss: In nats per token, over the whole step.
            has_finite_gradients: Whether all gradients are finite.
            can_roll_back: Whether there is a checkpoint.
            lowers_scale: Whether a gradient scaler answers gradients that are not finite with a
                lower scale. Such a step is skipped, but says nothing about the model.
        """
        if self.is_good(loss) and has_finite_gradients:
            self.in_a_row = 0
            self.num_taken += 1
            self.mean += (loss - self.mean) / min(self.num_taken, _STEPS_OF_MEAN)
            return StepAction.TAKE
        self.skipped += 1
        if lowers_scale and math.isfinite(loss) and not has_finite_gradients:
            return StepAction.SKIP
        self.in_a_row += 1
        is_spike = has_finite_gradients and math.isfinite(loss)
        if self.in_a_row <= self.max_skipped_steps and not (is_spike and can_roll_back):
            return StepAction.SKIP
        if can_roll_back and self.rollbacks < self.max_rollbacks:
            self.in_a_row = 0
            self.rollbacks += 1
            return StepAction.ROLL_BACK
        return StepAction.STOP

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {key: value for key, value in asdict(self).items() if key not in LIMITS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts; the limits stay those of this run."""
        for key, value in state.items():
            setattr(self, key, value)


class SpikeGuard(Callback):
    """Keep losses and gradients that are not finite out of weights and optimizer state.

    Every rank decides after the backward pass of the last micro-batch, before gradients are
    clipped, on sums over all ranks. A skipped step has its gradients removed, so the optimizer
    changes neither weights nor state nor its step count. Data and learning-rate schedule go on. So
    they do after a rollback: weights and optimizer are those of the last checkpoint, and the next
    rows are those after the spike.

    With gradient release, gradients are used inside the backward pass, unless `grad_offload` sums
    them in host memory. There the loss is checked
    before it, and a bad one is not propagated. If the loss is finite and a gradient is not, its
    bad values become 0, and the step counts as skipped.

    A gradient scaler, under 16-mixed, has scaled the gradients back before they are checked. It
    begins with a scale of 65536 and halves it whenever they overflow, as they may in the first
    steps. Those steps are skipped and counted; they do not count as steps in a row until the scale
    has come down to 1.

    Reading the sums synchronizes with a GPU once per optimizer step; a progress bar does so for
    every micro-batch anyway.

    Args:
        policy: The limits, and the counts of this run.
        checkpoint: The checkpoint to roll back to, which may not exist yet.
    """

    def __init__(self, policy: StepPolicy, checkpoint: Path) -> None:
        self.policy = policy
        self._checkpoint = checkpoint
        self._loss = 0.0  # of the current step, with gradient release
        self._largest_norm: Tensor | None = None  # of its gradients
        self._action = StepAction.TAKE

    @property
    @override
    def state_key(self) -> str:
        return "BadSteps"  # the former name of the class, in all checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.policy.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.policy.load_state_dict(state_dict)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LlamaFoam)
        pl_module.backward_guard = self

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LlamaFoam)
        pl_module.backward_guard = None

    # ---- checks of gradient release, see `optim.gradient_release.BackwardGuard`

    def allows_backward(self, loss: Tensor) -> bool:
        """Return whether a loss may be propagated; each parameter then steps inside backward."""
        self._loss = float(loss.detach())
        self._largest_norm = None
        return self.policy.is_good(self._loss)

    def make_finite_(self, grad: Tensor) -> None:
        """Set the values of a gradient that are not finite to 0, and record that there were any."""
        norm, before = _norm([grad]), self._largest_norm
        self._largest_norm = norm if before is None else torch.maximum(before, norm)
        grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    # ---- every step

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        assert isinstance(pl_module, LlamaFoam)
        loss, is_finite = self._step_sums(trainer, pl_module)
        # A broadcast by all ranks or by none: they have the same sums.
        is_good = is_finite and self.policy.is_good(loss)
        scaler = None if is_good else pl_module.gradient_scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        can_roll_back = not is_good and bool(trainer.strategy.broadcast(self._checkpoint.exists()))
        self._action = self.policy.decide(
            loss,
            has_finite_gradients=is_finite,
            can_roll_back=can_roll_back,
            lowers_scale=scale > 1,
        )
        if self._action is StepAction.TAKE:
            return
        problem = _describe(loss, pl_module, is_finite=is_finite, scale=scale)
        where = _locate(trainer, pl_module)
        if self._action is StepAction.STOP:
            raise DivergedError(self._stop_message(where, problem))
        pl_module.clear_gradients(optimizer)
        if self._action is StepAction.SKIP:
            pl_module.print(f"skipped {where}: {problem}")
        else:
            pl_module.print(
                f"rolled back at {where} to the last checkpoint: {problem}, the mean before was "
                f"{self.policy.mean:.3f}; continuing with the next rows"
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._action is StepAction.ROLL_BACK:
            _roll_back(trainer, self._checkpoint)
        self._action = StepAction.TAKE
        pl_module.log("train/skipped_steps", float(self.policy.skipped))
        if self.policy.max_rollbacks:
            pl_module.log("train/rollbacks", float(self.policy.rollbacks))

    def _step_sums(self, trainer: Trainer, module: LlamaFoam) -> tuple[float, bool]:
        """Return the loss of the step over all ranks, and whether all gradients are finite."""
        if module.updates_in_backward:
            norm = 0.0 if self._largest_norm is None else float(self._largest_norm)
            return self._loss, math.isfinite(norm)
        if module.host_gradients is not None:
            norm_of_all = module.host_gradients.norm()
        else:
            grads = [local_shard(p.grad) for p in module.parameters() if p.grad is not None]
            norm_of_all = _norm(grads)
        is_bad = ~norm_of_all.isfinite()
        sums = torch.stack([*module.step_mean.totals(), is_bad]).double()
        nats, scored, num_bad = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        return nats / max(1.0, scored), num_bad == 0

    def _stop_message(self, where: str, problem: str) -> str:
        policy = self.policy
        counts = f"{policy.in_a_row} bad steps in a row (model.max_skipped_steps)"
        if policy.max_rollbacks:
            counts += f" and {policy.rollbacks} rollbacks (model.max_rollbacks)"
        advice = "; the last checkpoint is from before" if self._checkpoint.exists() else ""
        return (
            f"training stopped at {where}: {problem}, after {counts}{advice}; lower model.lr, "
            "check these rows, or raise the limit"
        )


def _norm(grads: Iterable[Tensor]) -> Tensor:
    """Return the norm of all gradients: in one pass and, on a CPU, 20 times as fast as a maximum.

    It also overflows where squares do, which the second moment sums.
    """
    return torch.nn.utils.get_total_norm(grads)


def _describe(loss: float, module: LlamaFoam, *, is_finite: bool, scale: float) -> str:
    if is_finite or not math.isfinite(loss):
        return f"the loss is {loss:.4g}"
    if scale > 1:
        return f"gradients overflow float16 at a loss scale of {scale:.6g}, which is now halved"
    sums = module.host_gradients
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        is_bad = grad is not None and not local_shard(grad).isfinite().all()
        if is_bad or (sums is not None and not sums.has_finite_sum(parameter)):
            return f"the gradient of {name} is not finite"
    return "the gradient of some parameter is not finite"  # of another rank, or released


def _locate(trainer: Trainer, module: LlamaFoam) -> str:
    """Name the step and its rows, both counted from 1 over the run and all devices."""
    assert module.plan is not None
    rows = module.plan.memory_options.batch_size * trainer.world_size
    done = trainer.global_step
    return f"step {done + 1}, rows {done * rows + 1} to {(done + 1) * rows}"


def _roll_back(trainer: Trainer, path: Path) -> None:
    """Load weights and optimizer state of a checkpoint, but neither loops nor schedules."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]  # by the schedule
    checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
    trainer.strategy.load_model_state_dict(checkpoint, strict=True)
    trainer.strategy.load_optimizer_state_dict(checkpoint)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate

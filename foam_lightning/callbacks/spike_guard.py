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

# A spike is seen beside the mean of the last steps; before there are as many, there is none.
_STEPS_OF_MEAN = 50
_STEPS_BEFORE_SPIKES = 20

# What the settings say, beside what is counted.
LIMITS = ("max_skipped_steps", "spike_nats", "max_rollbacks")


class StepAction(Enum):
    """What to do with a step."""

    TAKE = auto()
    SKIP = auto()
    ROLL_BACK = auto()
    STOP = auto()


@dataclass(kw_only=True)
class StepPolicy:
    """Judge every step of a run by its loss and by whether its gradients are finite.

    A step with a number that is not finite is skipped. So many of them in a row are no accident:
    then the run rolls back to its last checkpoint, if it may, or stops. A spike is a finite loss
    far above the mean of the steps before, and is looked for only where the run may roll back.

    Attributes:
        max_skipped_steps: Steps in a row that are skipped; one more, and the run stops.
        spike_nats: How far above the running mean a loss is a spike.
        max_rollbacks: Over the whole run; 0 looks for no spikes.
        skipped: Steps that were not taken so far, those of rollbacks among them.
        rollbacks: So far.
    """

    max_skipped_steps: int
    spike_nats: float
    max_rollbacks: int
    skipped: int = 0
    rollbacks: int = 0
    in_a_row: int = 0
    mean: float = 0.0
    num_taken: int = 0

    def accepts(self, loss: float) -> bool:
        """Tell whether a loss is finite and no spike."""
        return math.isfinite(loss) and not self._spikes(loss)

    def judge(self, loss: float, *, has_finite_gradients: bool, can_roll_back: bool) -> StepAction:
        """Judge a step, and count it.

        Args:
            loss: In nats per token, over the whole step.
            has_finite_gradients: All of them.
            can_roll_back: There is a checkpoint.
        """
        if self.accepts(loss) and has_finite_gradients:
            self.in_a_row = 0
            self.num_taken += 1
            self.mean += (loss - self.mean) / min(self.num_taken, _STEPS_OF_MEAN)
            return StepAction.TAKE
        self.skipped += 1
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
        """Give the counts, which a run that goes on takes up again."""
        return {key: value for key, value in asdict(self).items() if key not in LIMITS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the counts; the limits are those of this run."""
        for key, value in state.items():
            setattr(self, key, value)

    def _spikes(self, loss: float) -> bool:
        return (
            self.max_rollbacks > 0
            and self.num_taken >= _STEPS_BEFORE_SPIKES
            and loss > self.mean + self.spike_nats
        )


class SpikeGuard(Callback):
    """Keep numbers that are not finite out of weights and moments.

    A step is judged when all its micro-batches went backward, before gradients are clipped, by
    every rank on the same sums. A step that is not taken has no gradients left, which every
    optimizer passes by: weights, moments and their count of steps stay as they were. Data and
    schedule go on, so that nothing bad comes twice. After a rollback too: weights and optimizer
    are those of the last checkpoint, and the next rows are the ones after the spike.

    Released gradients are spent inside backward. There the loss is judged before, and a bad one
    goes no way back; values of a gradient that are not finite under a loss that is count as zero,
    and the step counts as skipped.

    The numbers of a step are read once it has gone backward, so a GPU then waits for the next
    command; a terminal's progress bar reads the loss of every micro-batch as it is.

    Args:
        judge: Knows the limits.
        checkpoint: Where to roll back to, once it is there.
    """

    def __init__(self, judge: StepPolicy, checkpoint: Path) -> None:
        self.judge = judge
        self._checkpoint = checkpoint
        self._loss = 0.0  # of the step under way, where gradients are released
        self._worst: Tensor | None = None  # the largest norm among those gradients
        self._verdict = StepAction.TAKE

    @property
    @override
    def state_key(self) -> str:
        return "BadSteps"  # what checkpoints call it, also those of before it was renamed

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.judge.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.judge.load_state_dict(state_dict)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LlamaFoam)
        pl_module.backward_guard = self

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LlamaFoam)
        pl_module.backward_guard = None

    # ---- checks before gradients are released

    def allows_backward(self, loss: Tensor) -> bool:
        """Tell whether a loss may go backward, each parameter stepping as it gets its gradient."""
        self._loss = float(loss.detach())
        self._worst = None
        return self.judge.accepts(self._loss)

    def make_finite_(self, grad: Tensor) -> None:
        """Make a gradient finite that is spent at once, and remember whether it was."""
        worst = _norm([grad])
        self._worst = worst if self._worst is None else torch.maximum(self._worst, worst)
        grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    # ---- every step

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        assert isinstance(pl_module, LlamaFoam)
        loss, is_finite = self._numbers(trainer, pl_module)
        # Looked up by all ranks or by none, and the answer is the first one's.
        is_good = is_finite and self.judge.accepts(loss)
        can_roll_back = not is_good and bool(trainer.strategy.broadcast(self._checkpoint.exists()))
        self._verdict = self.judge.judge(
            loss, has_finite_gradients=is_finite, can_roll_back=can_roll_back
        )
        if self._verdict is StepAction.TAKE:
            return
        found = _in_words(loss, None if is_finite else _culprit(pl_module))
        where = _place(trainer, pl_module)
        if self._verdict is StepAction.STOP:
            raise DivergedError(self._why_stop(where, found))
        optimizer.zero_grad(set_to_none=True)
        if self._verdict is StepAction.SKIP:
            pl_module.print(f"skipped {where}: {found}")
        else:
            pl_module.print(
                f"rolled back at {where}, to the last checkpoint: {found}, "
                f"{self.judge.mean:.3f} before; the data goes on"
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._verdict is StepAction.ROLL_BACK:
            _roll_back(trainer, self._checkpoint)
        self._verdict = StepAction.TAKE
        pl_module.log("train/skipped_steps", float(self.judge.skipped))
        if self.judge.max_rollbacks:
            pl_module.log("train/rollbacks", float(self.judge.rollbacks))

    def _numbers(self, trainer: Trainer, module: LlamaFoam) -> tuple[float, bool]:
        """Read the loss of the step, and whether its gradients are finite, over all ranks."""
        if module.releases:
            worst = 0.0 if self._worst is None else float(self._worst)
            return self._loss, math.isfinite(worst)
        grads = [local_shard(p.grad) for p in module.parameters() if p.grad is not None]
        is_bad = ~_norm(grads).isfinite()
        sums = torch.stack([*module.step_mean.totals(), is_bad]).double()
        nats, scored, num_bad = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        return nats / max(1.0, scored), num_bad == 0

    def _why_stop(self, where: str, found: str) -> str:
        judge = self.judge
        counts = f"{judge.in_a_row} steps in a row (model.max_skipped_steps)"
        if judge.max_rollbacks:
            counts += f" and {judge.rollbacks} rollbacks (model.max_rollbacks)"
        has_one = self._checkpoint.exists()
        at = "its last checkpoint is from before" if has_one else "it has no checkpoint"
        return (
            f"training stopped at {where}: {found}, after {counts}; {at}; lower model.lr, look at "
            "these rows, or raise the limit"
        )


def _norm(grads: Iterable[Tensor]) -> Tensor:
    """Take the norm of all: one pass, no copy, and on a CPU 20 times as fast as the maximum.

    It is not finite either where squares are not, which are what the second moment adds up.
    """
    return torch.nn.utils.get_total_norm(grads)


def _in_words(loss: float, culprit: str | None) -> str:
    if not math.isfinite(loss) or culprit is None:
        return f"the loss is {loss:.4g}"
    return f"the gradient of {culprit} is not finite"


def _culprit(module: LlamaFoam) -> str:
    """Name the first parameter here whose gradient is not finite; any, where there is none."""
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not local_shard(parameter.grad).isfinite().all():
            return name
    return "some parameter"


def _place(trainer: Trainer, module: LlamaFoam) -> str:
    """Name the step and its rows, counted over the whole run and all devices."""
    assert module.plan is not None
    rows = module.plan.memory_options.batch_size * trainer.world_size
    done = trainer.global_step
    return f"step {done + 1}, rows {done * rows + 1} to {(done + 1) * rows}"


def _roll_back(trainer: Trainer, path: Path) -> None:
    """Load weights and optimizer of a checkpoint, and leave where the run is as it is."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]  # the schedule goes on
    checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
    trainer.strategy.load_model_state_dict(checkpoint, strict=True)
    trainer.strategy.load_optimizer_state_dict(checkpoint)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate

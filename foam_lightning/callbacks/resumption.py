"""Go on from a checkpoint with micro-batches of another size, at the very next row."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from foam_lightning.errors import CheckpointError
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan, Levers

_COUNTS = "epoch_loop.batch_progress"


class Resumption(Callback):
    """Make a checkpoint fit the micro-batch of the run that goes on from it.

    Lightning counts batches: by them it knows where in the epoch it is, whether the gradients of
    a step are complete, and when to evaluate. The rows that a step sees do not depend on the
    micro-batch, so the counts are turned into steps and back. Sampler and stream count rows.
    """

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert isinstance(pl_module, LlamaFoam)
        assert pl_module.plan is not None
        saved = FoldPlan.from_json(checkpoint["fold_plan"], source="the checkpoint's fold plan")
        rescale(checkpoint["loops"]["fit_loop"], saved.levers, pl_module.plan.levers)


def rescale(fit_loop: dict[str, Any], before: Levers, after: Levers) -> None:
    """Count batches of another size in the saved state of Lightning's fit loop.

    Args:
        fit_loop: The state, changed in place.
        before: The levers that it was saved with.
        after: The levers to go on with.

    Raises:
        CheckpointError: The rows of a step differ, or the state is of the middle of a step.
    """
    if after.batch_size != before.batch_size:
        raise CheckpointError(
            f"the checkpoint has {before.batch_size} rows a step on each device and this run "
            f"{after.batch_size}; go on with the batch size and the devices that it was trained "
            "with, or start a new run"
        )
    if after.micro_batch_size == before.micro_batch_size:
        return
    for counts in fit_loop[_COUNTS].values():
        if isinstance(counts, dict):
            done = _rescaled(counts["ready"], before, after)
            # A batch under way stays under way: saving happens before it counts as completed.
            counts.update({key: done - counts["ready"] + n for key, n in counts.items()})


def _rescaled(batches: int, before: Levers, after: Levers) -> int:
    steps, rest = divmod(batches, before.accumulate_grad_batches)
    if rest:
        raise CheckpointError(
            f"the checkpoint was saved after {rest} of the {before.accumulate_grad_batches} "
            "micro-batches of a step; go on with micro-batches of its size, "
            f"{before.micro_batch_size}, or from an older one"
        )
    return steps * after.accumulate_grad_batches

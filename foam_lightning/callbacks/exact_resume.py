"""Resume a checkpoint exactly, also with another micro-batch size or number of devices."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from typing_extensions import override

from foam_lightning.data.module import TextData
from foam_lightning.data.own import OwnData
from foam_lightning.data.saved import has_same_rows
from foam_lightning.errors import CheckpointError
from foam_lightning.module import LlamaFoam
from foam_lightning.optim.checkpoint import renumber_by_model_order
from foam_lightning.plan import FoldPlan, MemoryOptions

# The key in a checkpoint for what differs by rank, a list: its position in the data, and its RNGs.
RANKS = "ranks"
# Private to Lightning; checked with 2.6. tests/callbacks/test_exact_resume.py and
# tests/distributed/test_distributed.py fail if they change.
_COUNTS = "epoch_loop.batch_progress"


class ExactResume(Callback):
    """Save what Lightning's checkpoints lack, and convert its counts of batches on loading.

    Lightning counts batches to know its position in the epoch, whether the gradients of a step are
    complete, and when to evaluate. The rows of a step depend neither on the micro-batch size nor on
    the number of devices, so the counts are converted to the sizes of this run. Sampler and stream
    count rows.

    Lightning saves the data position of rank 0 only, but each rank reads its own stream; and it
    saves no random number generators, which dropout uses in some pretrained models.
    """

    def __init__(self) -> None:
        self._random: dict[str, Any] | None = None

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        random = {"cpu": torch.get_rng_state()}
        if pl_module.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(pl_module.device)
        loaders = checkpoint["loops"]["fit_loop"].get("state_dict", {}).get("combined_loader")
        ranks = [{"loaders": loaders or None, "random": random}] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(ranks, ranks[0])
        checkpoint[RANKS] = ranks
        if not isinstance(trainer.strategy, ModelParallelStrategy):  # which does it itself
            order = list(pl_module.parameters())
            checkpoint["optimizer_states"] = [
                renumber_by_model_order(state, optimizer.param_groups, order)
                for state, optimizer in zip(
                    checkpoint["optimizer_states"], trainer.optimizers, strict=True
                )
            ]

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert isinstance(pl_module, LlamaFoam)
        assert pl_module.plan is not None
        saved = FoldPlan.from_json(checkpoint["fold_plan"], source="the checkpoint's fold plan")
        num_ranks = count_ranks(checkpoint)
        rescale(
            checkpoint["loops"]["fit_loop"],
            saved.memory_options,
            pl_module.plan.memory_options,
            num_ranks=(num_ranks, trainer.world_size),
        )
        # With another number of ranks all take the position of rank 0, which counts rows over all.
        own = checkpoint[RANKS][trainer.global_rank if num_ranks == trainer.world_size else 0]
        data: Any = getattr(trainer, "datamodule", None)
        if isinstance(data, TextData | OwnData) and not has_same_rows(checkpoint, data.settings):
            begin_epoch(checkpoint["loops"]["fit_loop"])
        elif own["loaders"] is not None:
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = own["loaders"]
        self._random = own["random"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._random is not None:
            torch.set_rng_state(self._random["cpu"])
            if "cuda" in self._random and pl_module.device.type == "cuda":
                torch.cuda.set_rng_state(self._random["cuda"], pl_module.device)
        self._random = None


def count_ranks(checkpoint: dict[str, Any]) -> int:
    """Return how many ranks trained a checkpoint.

    Raises:
        CheckpointError: The checkpoint does not contain it.
    """
    ranks = checkpoint.get(RANKS)
    if not isinstance(ranks, list) or not ranks:
        raise CheckpointError(
            "the checkpoint does not contain the number of its devices: an older version or "
            "another tool wrote it; start a new run from its exported model (model.pretrained)"
        )
    return len(ranks)


def rescale(
    fit_loop: dict[str, Any],
    before: MemoryOptions,
    after: MemoryOptions,
    *,
    num_ranks: tuple[int, int] = (1, 1),
) -> None:
    """Convert the batch counts in the saved state of Lightning's fit loop to another batch size.

    Args:
        fit_loop: The state, changed in place.
        before: The memory options that it was saved with.
        after: The memory options to resume with.
        num_ranks: The number of ranks before and after.

    Raises:
        CheckpointError: The rows per step differ, or the state is from the middle of a step.
    """
    rows = before.batch_size * num_ranks[0], after.batch_size * num_ranks[1]
    if rows[0] != rows[1]:
        raise CheckpointError(
            f"the checkpoint has {rows[0]} rows per step and this run {rows[1]}; resume with "
            f"--data.batch_size {rows[0]}, or start a new run"
        )
    if after.accumulate_grad_batches == before.accumulate_grad_batches:
        return
    for counts in fit_loop[_COUNTS].values():
        if isinstance(counts, dict):
            done = _rescaled(counts["ready"], before, after)
            # The current batch is not completed yet: Lightning saves before it counts it.
            counts.update({key: done - counts["ready"] + n for key, n in counts.items()})


def begin_epoch(fit_loop: dict[str, Any]) -> None:
    """Let an epoch begin with the first row, since a position in other rows means nothing.

    Args:
        fit_loop: The state of Lightning's fit loop, changed in place.
    """
    fit_loop["state_dict"].pop("combined_loader", None)
    counts = fit_loop[_COUNTS]
    counts["current"] = dict.fromkeys(counts["current"], 0)


def _rescaled(batches: int, before: MemoryOptions, after: MemoryOptions) -> int:
    steps, rest = divmod(batches, before.accumulate_grad_batches)
    if rest:
        raise CheckpointError(
            f"the checkpoint was saved after {rest} of the {before.accumulate_grad_batches} "
            f"micro-batches of a step; resume with --data.micro_batch_size "
            f"{before.micro_batch_size}, or from an older checkpoint"
        )
    return steps * after.accumulate_grad_batches

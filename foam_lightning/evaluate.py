"""Validation: the mean loss per token, and perplexity, unbiased or as FOAM's code computes it."""

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from foam_lightning.data.module import TextData
from foam_lightning.data.own import OwnData
from foam_lightning.module import LlamaFoam


def validate(trainer: Trainer, module: LlamaFoam, data: TextData | OwnData) -> tuple[float, int]:
    """Evaluate on all validation rows.

    Returns:
        The mean loss in nats per token, and the number of tokens over all ranks.
    """
    count = _TokenCount()
    trainer.callbacks.append(count)  # type: ignore[attr-defined]
    (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    return float(metrics["validation/loss"]), count.num_tokens


class _TokenCount(Callback):
    def __init__(self) -> None:
        self.num_tokens = 0

    def on_validation_batch_end(self, *args: object, **_: object) -> None:
        outputs = args[2]
        if isinstance(outputs, Mapping):
            self.num_tokens += int(outputs["num_tokens"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counted = torch.tensor(self.num_tokens, device=pl_module.device)
        self.num_tokens = int(trainer.strategy.reduce(counted, reduce_op="sum"))


def format_perplexity(loss: float, num_tokens: int, *, num_batches: int | None = None) -> str:
    """Format the result of an evaluation.

    Args:
        loss: The mean loss in nats per token.
        num_tokens: The number of tokens.
        num_batches: The number of batches, to add the biased perplexity; None leaves it out.

    Returns:
        A line, or two with the biased perplexity.
    """
    line = f"loss {loss:.4f} nats, perplexity {math.exp(loss):.2f}, over {num_tokens} tokens"
    if num_batches is None:
        return line
    biased = math.exp(biased_loss(loss, num_batches))
    return (
        f"{line}\nperplexity {biased:.2f} as the released FOAM code would print it: the sum of "
        f"the losses of {num_batches} batches divided by {num_batches + 1}"
    )


def biased_loss(loss: float, num_batches: int) -> float:
    """Bias a loss as the code released with FOAM (arXiv:2512.07112) and GaLore does.

    That code starts counting batches at one, so it divides the sum of n losses by n + 1, and its
    perplexities are too low: by 3.3 % with 100 batches at a loss of 3.4. The bias depends on the
    number of batches, so a published number compares only with one of equal batches. One
    departure: this loss is the mean over tokens, not over the means of batches, which is the same
    if all rows are full.

    Args:
        loss: The mean loss in nats per token.
        num_batches: n, above 0.
    """
    return loss * num_batches / (num_batches + 1)

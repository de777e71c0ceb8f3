"""What tells one run from another in TensorBoard's tab "hparams": settings and final figures."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from foam_lightning.job import Job
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan
from foam_lightning.units import in_words


def settings_of(
    job: Job, module: LlamaFoam, plan: FoldPlan, budget_bytes: int | None
) -> dict[str, str | float]:
    """Name the settings that runs are compared by; every run has all of them.

    The tab takes names and types from one run for all, so each is a text or a number for good. It
    sorts by name and shows five: budget, lr, optimizer, plan and scale are the first.

    Args:
        job: What is trained.
        module: Has the sizes of the model.
        plan: The levels, the learning rate and the levers.
        budget_bytes: The budget; None where there was none.

    Returns:
        The settings by name. `scale` is that of most matrices; a rival of FOAM has neither plan
        nor scale of its own.
    """
    optimizer = str(job.model.get("optimizer") or "foam")
    scales = plan.scales.values() if optimizer == "foam" else ()
    (scale, _), *_ = Counter(scales).most_common(1) or [(1.0, 0)]
    return {
        "budget": "none" if budget_bytes is None else in_words(budget_bytes),
        "lr": plan.lr,
        "optimizer": optimizer,
        "plan": plan_in_words(plan.levels if optimizer == "foam" else {}),
        "scale": scale,
        "seed": job.seed,
        "sequence_length": int(job.data["sequence_length"]),
        "sequences_per_step": job.batch_size,
        "state_dtype": plan.levers.state_dtype,
        "steps": job.max_steps,
        "weights": sum(math.prod(shape) for shape in module.shapes.values()),
        "weights_precision": job.precision,
    }


def figures_of(
    validation_loss: float, peak_bytes: int | None, tokens_per_second: float | None
) -> dict[str, Any]:
    """Name the final figures by their tags; what is not known is left out.

    Args:
        validation_loss: In nats per token.
        peak_bytes: Measured.
        tokens_per_second: Over the whole run.
    """
    figures = {
        "final/validation_loss": validation_loss,
        "final/peak_bytes": peak_bytes,
        "final/tokens_per_second": tokens_per_second,
    }
    return {tag: float(figure) for tag, figure in figures.items() if figure is not None}


def plan_in_words(levels: Mapping[str, int]) -> str:
    """Name the levels of a plan in two words: "level 2", or "mixed 0-4".

    Args:
        levels: By parameter name.
    """
    if not levels:
        return "unfolded"
    least, most = min(levels.values()), max(levels.values())
    return f"level {least}" if least == most else f"mixed {least}-{most}"

"""The rehearsal: two real steps, one evaluation and one checkpoint at full size."""

import json

from foam_lightning.callbacks.memory import MemoryWatch
from foam_lightning.errors import FoamError
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from foam_lightning.run_folder import RunFolder, write_json
from foam_lightning.units import in_words


def rehearse(
    job: Job, plan: FoldPlan, folder: RunFolder, *, predicted_bytes: int, budget_bytes: int
) -> int:
    """Run what the full run will do, once, and measure its peak.

    The result is kept in `tuning/rehearsal.json`; a second call reads it.

    Args:
        job: What to train.
        plan: What to train by.
        folder: Where the run keeps its files.
        predicted_bytes: The account's peak.
        budget_bytes: What the peak must stay below.

    Returns:
        The measured peak in bytes.

    Raises:
        FoamError: The peak is above the budget, whatever the account said.
    """
    result = folder.tuning / "rehearsal.json"
    if result.exists():
        kept = json.loads(result.read_text(encoding="utf-8"))
        if kept["fold_plan"] == plan.to_json():
            return int(kept["measured_peak_bytes"])
    measured = _measure(job, plan, folder)
    if measured > budget_bytes:
        raise FoamError(
            f"the rehearsal took {in_words(measured)}, predicted were {in_words(predicted_bytes)}, "
            f"the budget is {in_words(budget_bytes)}; raise --memory-budget by "
            f"{in_words(measured - budget_bytes)} and report this"
        )
    write_json(
        result,
        {
            "predicted_peak_bytes": predicted_bytes,
            "measured_peak_bytes": measured,
            "fold_plan": plan.to_json(),
        },
    )
    return measured


def _measure(job: Job, plan: FoldPlan, folder: RunFolder) -> int:
    module = job.new_module()
    module.follow(plan)
    data = job.new_data(plan.levers)
    memory = MemoryWatch()
    trainer = job.new_trainer(
        plan.levers,
        [memory],
        bare=True,
        max_steps=2,
        limit_val_batches=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, datamodule=data)
    checkpoint = folder.tuning / "rehearsal.ckpt"
    trainer.save_checkpoint(checkpoint)
    checkpoint.unlink()
    assert memory.measured_bytes is not None
    return memory.measured_bytes

"""The rehearsal: two real steps, one evaluation and one checkpoint at full size."""

import json
from dataclasses import dataclass
from typing import Any

from foam_lightning.callbacks.memory import MemoryMonitor
from foam_lightning.job import Job
from foam_lightning.memory.device import MemoryShortageError, memory_shortage_context
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.atomic import write_json
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.units import format_bytes

_STEPS = 2


@dataclass(frozen=True)
class Rehearsal:
    """What the rehearsal took.

    Attributes:
        measured_peak_bytes: The peak: on a GPU of the whole process, on a CPU of the tensors.
        allocated_bytes: On a GPU, the peak of the bytes in tensors.
        reserved_bytes: On a GPU, the peak of what the caching allocator held for them.
        allocator_retries: On a GPU, how often it had to give cached memory back first.
    """

    measured_peak_bytes: int
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    allocator_retries: int | None = None

    def __str__(self) -> str:
        words = f"{format_bytes(self.measured_peak_bytes)} measured"
        if self.allocated_bytes is not None and self.reserved_bytes is not None:
            words += (
                f" ({format_bytes(self.allocated_bytes)} allocated, "
                f"{format_bytes(self.reserved_bytes)} "
                f"reserved, {self.allocator_retries} retries)"
            )
        return words


def rehearse(
    job: Job, plan: FoldPlan, folder: RunFolder, *, predicted_bytes: int, budget_bytes: int
) -> Rehearsal:
    """Run what the full run will do, once, and measure its peak.

    The result is kept in `tuning/rehearsal.json`; a second call reads it.

    Args:
        job: What to train.
        plan: What to train by.
        folder: Where the run keeps its files.
        predicted_bytes: The account's peak.
        budget_bytes: What the peak must stay below.

    Raises:
        MemoryShortageError: The peak is above the budget or the device, whatever the account said.
    """
    result = folder.tuning / "rehearsal.json"
    if result.exists():
        kept = json.loads(result.read_text(encoding="utf-8"))
        if kept.pop("fold_plan") == plan.to_json():
            kept.pop("predicted_peak_bytes")
            return Rehearsal(**kept)
    measured = _measure(job, plan, folder)
    if measured.measured_peak_bytes > budget_bytes:
        raise MemoryShortageError(
            "the rehearsal",
            plan,
            _STEPS,
            f"it took {format_bytes(measured.measured_peak_bytes)}, the budget is "
            f"{format_bytes(budget_bytes)}",
        )
    content: dict[str, Any] = {"predicted_peak_bytes": predicted_bytes, **measured.__dict__}
    write_json(result, {**content, "fold_plan": plan.to_json()})
    return measured


def _measure(job: Job, plan: FoldPlan, folder: RunFolder) -> Rehearsal:
    module = job.new_module()
    module.follow(plan)
    data = job.new_data(plan.memory_options)
    memory = MemoryMonitor(through_evaluation=True)
    trainer = job.new_trainer(
        plan.memory_options,
        [memory],
        bare=True,
        max_steps=_STEPS,
        limit_val_batches=1,
        val_check_interval=_STEPS,
        check_val_every_n_epoch=None,
    )
    checkpoint = folder.tuning / "rehearsal.ckpt"
    checkpoint.unlink(missing_ok=True)  # of a rehearsal that was killed
    try:
        with memory_shortage_context("the rehearsal", plan, trainer):
            trainer.fit(module, datamodule=data)
            trainer.save_checkpoint(checkpoint)
    finally:
        checkpoint.unlink(missing_ok=True)
    assert memory.measured_bytes is not None
    usage = memory.usage
    return Rehearsal(memory.measured_bytes, *(usage or ()))

"""Training on rows of unequal length."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from tests.support.runs import QUIET, NewJob

BATCH = 4


def job_of_unequal_rows(new_job: NewJob, folder: Path, **trainer: Any) -> Job:
    """Make a job of three steps on padded rows of 2 to 16 tokens.

    A large eps keeps Adam from amplifying rounding errors.
    """
    path = folder / "texts.jsonl"
    texts = [f"{i} and " * (1 + i * i % 7) for i in range(60)]
    if not path.exists():
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return new_job(
        data={"files": [str(path)], "packing": False, "batch_size": BATCH},
        model={"eps": 1e-2},
        trainer={"max_steps": 3, **trainer},
    )


def trained(job: Job, **memory_options: Any) -> dict[str, Tensor]:
    """Train with these memory options, and return the whole weights."""
    plan: FoldPlan = job.uniform_plan(1)
    plan = replace(plan, memory_options=replace(plan.memory_options, **memory_options))
    module = job.new_module()
    module.set_plan(plan)
    trainer = job.new_trainer(plan.memory_options, [], **QUIET, limit_val_batches=0)
    trainer.fit(module, datamodule=job.new_data(plan.memory_options))
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.named_parameters()
    }

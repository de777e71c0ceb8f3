import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foam_lightning.plan import FoldPlan
from tests.runs import NewJob

BATCH = 4


@pytest.fixture
def unequal(tmp_path: Path) -> dict[str, Any]:
    """Rows of 2 to 16 tokens, padded."""
    path = tmp_path / "texts.jsonl"
    texts = [f"{i} and " * (1 + i * i % 7) for i in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"files": [str(path)], "packing": False, "batch_size": BATCH}


def trained(new_job: NewJob, data: dict[str, Any], **levers: Any) -> dict[str, Tensor]:
    """Train three steps, with an eps that does not blow rounding up."""
    job = new_job(data=data, model={"eps": 1e-2}, trainer={"max_steps": 3})
    plan: FoldPlan = job.plan_at(1)
    plan = replace(plan, levers=replace(plan.levers, **levers))
    module = job.new_module()
    module.follow(plan)
    trainer = job.new_trainer(plan.levers, [], bare=True)
    trainer.fit(module, datamodule=job.new_data(plan.levers))
    return {name: p.detach().clone() for name, p in module.named_parameters()}


WAYS: dict[str, dict[str, Any]] = {
    "one by one": {"micro_batch_size": 1, "accumulate_grad_batches": 4},
    "two by two": {"micro_batch_size": 2, "accumulate_grad_batches": 2},
    "released": {"micro_batch_size": 4, "gradient_release": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_micro_batches_of_unequal_rows_change_nothing(
    way: str, new_job: NewJob, unequal: dict[str, Any]
) -> None:
    whole = trained(new_job, unequal, micro_batch_size=BATCH)
    found = trained(new_job, unequal, **WAYS[way])
    for name, weights in whole.items():
        torch.testing.assert_close(found[name], weights, atol=1e-6, rtol=0, msg=name)

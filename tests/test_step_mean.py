from pathlib import Path
from typing import Any

import pytest
import torch

from foam_lightning.job import Job
from tests.runs import NewJob
from tests.unequal import BATCH, job_of_unequal_rows, trained


@pytest.fixture
def unequal(new_job: NewJob, tmp_path: Path) -> Job:
    return job_of_unequal_rows(new_job, tmp_path)


WAYS: dict[str, dict[str, Any]] = {
    "one by one": {"micro_batch_size": 1, "accumulate_grad_batches": 4},
    "two by two": {"micro_batch_size": 2, "accumulate_grad_batches": 2},
    "released": {"micro_batch_size": 4, "gradient_release": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_micro_batches_of_unequal_rows_change_nothing(way: str, unequal: Job) -> None:
    whole = trained(unequal, micro_batch_size=BATCH)
    found = trained(unequal, **WAYS[way])
    for name, weights in whole.items():
        torch.testing.assert_close(found[name], weights, atol=1e-6, rtol=0, msg=name)

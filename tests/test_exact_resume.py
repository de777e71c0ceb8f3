"""A run that is stopped after any step and resumed ends like one that is not, bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from foam_lightning.data import streaming
from foam_lightning.errors import DataError
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from tests.planted import Plant
from tests.pretrained import save_tokenizer
from tests.resumed import BLOCK, data_of, differences, fit
from tests.runs import NewJob

STEPS = 7


class Settings(NamedTuple):
    """The settings of a run; each value of one occurs with every value of another."""

    state_dtype: str
    stepping: str
    data: str
    num_workers: int
    stops: tuple[int, ...]
    precision: str = "32-true"


MATRIX = [
    Settings("float32", "whole", "rows", 0, (1, 4)),
    Settings("float32", "accumulated", "stream", 2, (2,)),
    Settings("float32", "released", "mixture", 2, (3,)),
    Settings("float32", "offloaded", "stream", 0, (5,)),
    Settings("bfloat16", "whole", "stream", 2, (3,), "bf16-true"),
    Settings("bfloat16", "accumulated", "rows", 2, (4,)),
    Settings("bfloat16", "released", "stream", 0, (1,), "bf16-true"),
    Settings("bfloat16", "offloaded", "mixture", 0, (3,), "bf16-mixed"),
    Settings("int8", "whole", "mixture", 2, (2,)),
    Settings("int8", "accumulated", "rows", 0, (6,), "bf16-true"),
    Settings("int8", "released", "rows", 2, (5,), "bf16-mixed"),
    Settings("int8", "offloaded", "stream", 2, (4,), "bf16-true"),
]
STEPPING: dict[str, dict[str, Any]] = {
    "whole": {},
    "accumulated": {"micro_batch_size": 2, "accumulate_grad_batches": 4},
    "released": {"gradient_release": True},
    "offloaded": {"state_offload": True},
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_BLOCK_CHARACTERS", BLOCK)


def mixed_plan(job: Job, stepping: str) -> FoldPlan:
    """Return a plan of several levels, row fold among them."""
    plan = job.uniform_plan(1)
    levels = {name: (0, 1, 3, 8)[place % 4] for place, name in enumerate(plan.levels)}
    return replace(
        plan, levels=levels, memory_options=replace(plan.memory_options, **STEPPING[stepping])
    )


def assert_exact(job: Job, plan: FoldPlan, folder: Path, stops: tuple[int, ...]) -> None:
    whole = folder / "whole"
    plant = Plant("gradient", (1,))  # a skipped step is no step of the optimizer
    losses = fit(job, plan, whole, plant, stops=stops)
    assert len(losses) == STEPS
    for stop in stops:
        rest = folder / f"from-{stop}"
        found = fit(job, plan, rest, Plant("gradient", (1,)), start=whole / f"{stop}.ckpt")
        assert found == losses[stop:], stop
        assert differences(whole / f"{STEPS}.ckpt", rest / f"{STEPS}.ckpt") == [], stop


@pytest.mark.parametrize("settings", MATRIX, ids=lambda settings: "-".join(map(str, settings[:4])))
def test_a_stopped_run_resumes_exactly(settings: Settings, new_job: NewJob, tmp_path: Path) -> None:
    job = new_job(
        model={"state_dtype": settings.state_dtype},
        data={**data_of(settings.data, tmp_path), "num_workers": settings.num_workers},
        trainer={"max_steps": STEPS, "val_check_interval": 3, "precision": settings.precision},
    )
    assert_exact(job, mixed_plan(job, settings.stepping), tmp_path, settings.stops)


def test_dropout_of_a_pretrained_model_resumes_exactly(new_job: NewJob, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "pretrained"
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, vocab_size=300, template=None)
    job = new_job(
        model={"pretrained": str(folder)},
        data=data_of("rows", tmp_path),
        trainer={"max_steps": STEPS, "val_check_interval": 3},
    )
    assert_exact(job, mixed_plan(job, "accumulated"), tmp_path, (4,))


def test_another_number_of_workers_is_refused(new_job: NewJob, tmp_path: Path) -> None:
    data = data_of("rows", tmp_path)
    job, other = (
        new_job(data={**data, "num_workers": n}, trainer={"max_steps": 1}) for n in (0, 1)
    )
    fit(job, job.uniform_plan(1), tmp_path)
    with pytest.raises(DataError, match=r"data\.num_workers 0, this run has 1"):
        fit(other, other.uniform_plan(1), tmp_path / "other", start=tmp_path / "1.ckpt")

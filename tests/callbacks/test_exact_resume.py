"""A run that is stopped after any step and resumed ends like one that is not, bit for bit.

With micro-batches of another size it sees the same rows, and ends alike up to rounding.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from foam_lightning.callbacks.exact_resume import rescale
from foam_lightning.checkpoint.load import read_checkpoint
from foam_lightning.data import streaming
from foam_lightning.errors import CheckpointError, DataError
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan, MemoryOptions
from tests.support.planted import Plant
from tests.support.pretrained import save_tokenizer
from tests.support.resumed import BLOCK, Rows, data_of, differences, fit
from tests.support.runs import NewJob

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
    Settings("float32", "accumulated", "rows", 0, (3,), "16-mixed"),
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
def test_a_stopped_run_resumes_exactly(
    settings: Settings, new_job: NewJob, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    is_float16 = settings.precision == "16-mixed"
    if is_float16:
        request.getfixturevalue("float16_on_cpu")
    job = new_job(
        model={"state_dtype": settings.state_dtype},
        data={**data_of(settings.data, tmp_path), "num_workers": settings.num_workers},
        trainer={
            "max_steps": STEPS,
            "val_check_interval": 3,
            "precision": settings.precision,
            "accelerator": "auto" if is_float16 else "cpu",
        },
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


# ---- micro-batches of another size

PLAIN = MemoryOptions(micro_batch_size=4, accumulate_grad_batches=2)
HALVED = MemoryOptions(micro_batch_size=2, accumulate_grad_batches=4, chunked_loss=True)
RELEASING = MemoryOptions(micro_batch_size=8, gradient_release=True, activation_checkpointing=True)


@pytest.mark.parametrize(
    ("data", "num_workers", "stops"),
    [("rows", 0, (1, 3, 4, 5)), ("rows", 1, (4,)), ("stream", 0, (1, 4)), ("stream", 2, (4,))],
)
def test_another_micro_batch_size_resumes_at_the_very_next_row(
    new_job: NewJob, tmp_path: Path, data: str, num_workers: int, stops: tuple[int, ...]
) -> None:
    job = new_job(
        data={**data_of(data, tmp_path), "num_workers": num_workers},
        trainer={"max_steps": STEPS, "val_check_interval": 3},
    )
    plans = [replace(job.uniform_plan(2), memory_options=m) for m in (PLAIN, HALVED, RELEASING)]
    whole = Rows()
    losses = fit(job, plans[0], tmp_path / "whole", whole, stops=stops)
    assert whole.evaluated == [3, 6]
    for plan in plans[1:]:
        for stop in stops:
            rest, start = Rows(), tmp_path / "whole" / f"{stop}.ckpt"
            found = fit(job, plan, tmp_path / "rest", rest, start=start)
            assert rest.rows == whole.rows[stop:], (plan.memory_options, stop)
            assert found == pytest.approx(losses[stop:], abs=1e-5)
            assert rest.evaluated == [step for step in whole.evaluated if step > stop]


def test_a_run_that_changes_its_micro_batch_twice_ends_like_one_that_does_not(
    new_job: NewJob, tmp_path: Path
) -> None:
    job = new_job(data=data_of("rows", tmp_path), trainer={"max_steps": STEPS})
    plan, others = job.uniform_plan(2), Rows()
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    whole, rest = Rows(), Rows()
    fit(job, replace(plan, memory_options=RELEASING), first, whole, stops=(2,))
    halved = replace(plan, memory_options=HALVED)
    fit(job, halved, second, others, start=first / "2.ckpt", stops=(5,))
    fit(job, replace(plan, memory_options=PLAIN), third, rest, start=second / "5.ckpt")
    assert whole.rows == whole.rows[:2] + others.rows[:3] + rest.rows
    expected, found = (
        read_checkpoint(folder / f"{STEPS}.ckpt")["optimizer_states"][0]["state"]
        for folder in (first, third)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def state(ready: int) -> dict[str, Any]:
    counts = {"ready": ready, "started": ready, "processed": ready, "completed": ready - 1}
    progress = {"total": dict(counts), "current": dict(counts), "is_last_batch": False}
    return {"epoch_loop.batch_progress": progress}


@pytest.mark.parametrize(
    ("ready", "before", "after", "expected"),
    [
        (6, PLAIN, HALVED, 12),
        (12, HALVED, RELEASING, 3),
        # In the middle of a step, where a user's own callback may save.
        (5, PLAIN, replace(PLAIN, chunked_loss=True), 5),
    ],
)
def test_the_current_batch_stays_current(
    ready: int, before: MemoryOptions, after: MemoryOptions, expected: int
) -> None:
    fit_loop = state(ready)
    rescale(fit_loop, before, after)
    assert fit_loop == state(expected)


@pytest.mark.parametrize(
    ("ready", "after", "message"),
    [
        (5, HALVED, r"1 of the 2 micro-batches .* --data\.micro_batch_size 4"),
        (4, replace(PLAIN, micro_batch_size=2), r"8 rows .* 4; .* --data\.batch_size 8"),
    ],
)
def test_another_batch_or_a_half_step_is_refused(
    ready: int, after: MemoryOptions, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        rescale(state(ready), PLAIN, after)

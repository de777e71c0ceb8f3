"""A run resumes exactly with micro-batches of another size."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from foam_lightning.callbacks.exact_resume import ExactResume, rescale
from foam_lightning.errors import CheckpointError
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan, MemoryOptions
from tests.runs import NewJob

STEPS = 8
PLAIN = MemoryOptions(micro_batch_size=4, accumulate_grad_batches=2)
HALVED = MemoryOptions(micro_batch_size=2, accumulate_grad_batches=4, chunked_loss=True)
RELEASING = MemoryOptions(micro_batch_size=8, gradient_release=True, activation_checkpointing=True)


class Steps(Callback):
    """Record the rows and the loss of every step, and the steps before an evaluation."""

    def __init__(self) -> None:
        self.rows: list[list[list[int]]] = []
        self.losses: list[float] = []
        self.evaluated: list[int] = []
        self._parts: list[tuple[list[list[int]], float]] = []
        self._last_step: int | None = None

    def on_train_start(self, trainer: Trainer, _: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, _: LightningModule, outputs: Any, batch: Any, __: int
    ) -> None:
        self._parts.append((batch["input_ids"].tolist(), float(outputs["loss"])))
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.rows.append(list(chain.from_iterable(rows for rows, _ in self._parts)))
            # Lightning has divided each by the number of micro-batches.
            self.losses.append(sum(loss for _, loss in self._parts))
            self._parts = []

    def on_validation_end(self, trainer: Trainer, _: LightningModule) -> None:
        self.evaluated.append(trainer.global_step)


class Save(Callback):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        path = self._folder / f"{trainer.global_step}.ckpt"
        if trainer.global_step and not path.exists():  # only after whole steps
            trainer.save_checkpoint(path)


def fit(
    job: Job,
    plan: FoldPlan,
    memory_options: MemoryOptions,
    *callbacks: Callback,
    start: Path | None = None,
) -> Steps:
    module, steps = job.new_module(), Steps()
    module.set_plan(replace(plan, memory_options=memory_options))
    trainer = job.new_trainer(
        memory_options,
        [ExactResume(), steps, *callbacks],
        bare=True,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
    )
    trainer.fit(module, datamodule=job.new_data(memory_options), ckpt_path=start, weights_only=True)
    assert trainer.global_step == STEPS
    return steps


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(_name: str, _config: str | None, *, streaming: bool) -> Any:
        lines = [f"{index} and {index * index % 97} make {index * 3}.\n" for index in range(300)]
        parts = {"train": lines[:200], "validation": lines[200:]}
        splits = {name: datasets.Dataset.from_dict({"text": part}) for name, part in parts.items()}
        return {name: part.to_iterable_dataset(num_shards=2) for name, part in splits.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.fixture
def short_epochs(new_job: NewJob, tmp_path: Path) -> Callable[..., Job]:
    """Return a maker of jobs whose epochs are a few steps."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i * i % 97} make {i * 3}.\n" for i in range(60)))

    def make(**data: Any) -> Job:
        own = {"files": [str(text)], "cache_dir": str(tmp_path / "cache")}
        loader = new_job(data=own).new_data(PLAIN)
        loader.setup()
        assert 2 * 3 <= len(loader.train_dataloader()) < 2 * STEPS
        return new_job(data={**own, **data})

    return make


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("data", "saved_at"),
    [
        ({}, (1, 3, 4, 5)),
        ({"num_workers": 1}, (4,)),
        ({"files": None, "dataset": "some/text", "streaming": True}, (1, 4)),
        ({"files": None, "dataset": "some/text", "streaming": True, "num_workers": 2}, (4,)),
    ],
    ids=["rows", "rows-worker", "stream", "stream-workers"],
)
def test_another_micro_batch_size_resumes_at_the_very_next_row(
    short_epochs: Callable[..., Job], tmp_path: Path, data: dict[str, Any], saved_at: tuple[int]
) -> None:
    job = short_epochs(**data)
    plan = job.uniform_plan(2)
    whole = fit(job, plan, PLAIN, Save(tmp_path))
    assert whole.evaluated == [3, 6]
    for memory_options in (HALVED, RELEASING):
        for step in saved_at:
            rest = fit(job, plan, memory_options, start=tmp_path / f"{step}.ckpt")
            assert rest.rows == whole.rows[step:], (memory_options, step)
            assert rest.losses == pytest.approx(whole.losses[step:], abs=1e-5)
            assert rest.evaluated == [at for at in whole.evaluated if at > step]


def test_a_run_that_changes_its_micro_batch_twice_ends_like_one_that_does_not(
    short_epochs: Callable[..., Job], tmp_path: Path
) -> None:
    job = short_epochs()
    plan = job.uniform_plan(2)
    first, second = tmp_path / "first", tmp_path / "second"
    whole = fit(job, plan, RELEASING, Save(first))
    fit(job, plan, HALVED, Save(second), start=first / "2.ckpt")
    rest = fit(job, plan, PLAIN, start=second / "5.ckpt")
    assert rest.rows == whole.rows[5:]
    assert rest.losses == pytest.approx(whole.losses[5:], abs=1e-5)
    states = [
        torch.load(folder / f"{STEPS}.ckpt", weights_only=True)["optimizer_states"][0]["state"]
        for folder in (first, second)
    ]
    for key, expected in states[0].items():
        torch.testing.assert_close(states[1][key], expected, rtol=1e-4, atol=1e-6)


def state(ready: int) -> dict[str, Any]:
    counts = {"ready": ready, "started": ready, "processed": ready, "completed": ready - 1}
    return {
        "epoch_loop.batch_progress": {
            "total": dict(counts),
            "current": dict(counts),
            "is_last_batch": False,
        },
    }


def test_the_current_batch_stays_current() -> None:
    fit_loop = state(6)
    rescale(fit_loop, PLAIN, HALVED)
    assert fit_loop == state(12)
    rescale(fit_loop, HALVED, RELEASING)
    assert fit_loop == state(3)


def test_other_memory_options_change_no_count() -> None:
    fit_loop = state(5)  # in the middle of a step, where a user's own callback may save
    rescale(fit_loop, PLAIN, replace(PLAIN, chunked_loss=True))
    assert fit_loop == state(5)


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

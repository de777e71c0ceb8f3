import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.functional import cross_entropy

from foam_lightning.checkpoint.load import read_checkpoint
from foam_lightning.data.module import TextData
from foam_lightning.errors import CheckpointError, ConfigError, PlanError
from foam_lightning.job import Job
from foam_lightning.module import LlamaFoam
from foam_lightning.optim.schedule import learning_rate_factor
from foam_lightning.plan import FoldPlan

NewJob = Callable[..., Job]


class Watch(Callback):
    """Note the losses, and whether gradients are there after each batch."""

    def __init__(self, folder: Path | None = None) -> None:
        self.losses: list[float] = []
        self.has_gradients: list[bool] = []
        self.rates: list[float] = []
        self._folder = folder

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.has_gradients.append(any(p.grad is not None for p in module.parameters()))
        self.rates.append(float(trainer.callback_metrics["train/learning_rate"]))
        if self._folder is not None:
            trainer.save_checkpoint(self._folder / f"{trainer.global_step}.ckpt")


def fit(
    job: Job, plan: FoldPlan, watch: Watch, resume_from: Path | None = None, **settings: Any
) -> tuple[LlamaFoam, TextData, Trainer]:
    module = job.new_module()
    module.set_plan(plan)
    data = job.new_data(plan.memory_options)
    trainer = job.new_trainer(
        plan.memory_options, [watch], bare=True, limit_val_batches=0, **settings
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
    trainer.limit_val_batches = 1.0
    return module, data, trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_training_learns(new_job: NewJob, precision: str) -> None:
    job = new_job(trainer={"max_steps": 40, "precision": precision})
    watch = Watch()
    module, *_ = fit(job, job.uniform_plan(2), watch)
    first, last = sum(watch.losses[:3]) / 3, sum(watch.losses[-3:]) / 3
    assert first == pytest.approx(math.log(300), abs=0.2)
    assert last < first - 1
    assert not any(watch.has_gradients)
    options = {"warmup_fraction": 0.1, "decay_fraction": 0.2, "final_fraction": 0.1}
    expected = learning_rate_factor(40, schedule="cosine", **options)
    assert watch.rates == pytest.approx([0.01 * expected(step) for step in range(40)])
    state_dtypes = {s["exp_avg"].dtype for s in module.trainer.optimizers[0].state.values()}
    assert state_dtypes == {torch.float32}


def test_gradients_live_until_the_optimizer_step(new_job: NewJob) -> None:
    job = new_job(data={"micro_batch_size": 4}, trainer={"max_steps": 3})
    watch = Watch()
    fit(job, job.uniform_plan(1), watch)
    assert watch.has_gradients == [True, False] * 3


def test_accumulation_changes_nothing_but_memory(new_job: NewJob) -> None:
    found = []
    for micro in (8, 4):
        job = new_job(data={"micro_batch_size": micro}, trainer={"max_steps": 4})
        watch = Watch()
        module, *_ = fit(job, job.uniform_plan(1), watch)
        losses = torch.tensor(watch.losses).view(4, -1).sum(1)  # Lightning has divided them
        found.append((losses, torch.cat([p.detach().flatten() for p in module.parameters()])))
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", ["plain", "accumulating", "releasing"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_checkpointing_changes_nothing_to_the_last_bit(
    new_job: NewJob, precision: str, option: str
) -> None:
    job = new_job(
        data={"micro_batch_size": 4 if option == "accumulating" else 8},
        trainer={"precision": precision, "max_steps": 3},
    )
    plan = job.uniform_plan(1)
    base = replace(plan.memory_options, gradient_release=option == "releasing")
    found = []
    for checkpoints, selective in ((False, False), (True, True), (True, False)):
        memory_options = replace(
            base, activation_checkpointing=checkpoints, selective_checkpointing=selective
        )
        watch = Watch()
        module, *_ = fit(job, replace(plan, memory_options=memory_options), watch)
        found.append((watch.losses, torch.cat([p.detach().flatten() for p in module.parameters()])))
    for losses, weights in found[1:]:
        assert losses == found[0][0]
        assert torch.equal(weights, found[0][1])


def test_the_validation_loss_is_over_tokens_not_batches(new_job: NewJob, tmp_path: Path) -> None:
    # 20 rows in batches of 8, and rows of one document each, so that no two batches are alike.
    documents = tmp_path / "documents.jsonl"
    documents.write_text(
        "".join(json.dumps({"text": f"{i} and " * (1 + i % 9)}) + "\n" for i in range(600))
    )
    job = new_job(data={"files": [str(documents)], "packing": False, "sequence_length": 24})
    module, data, trainer = fit(job, job.uniform_plan(2), Watch())
    (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    nats, counts = 0.0, []
    model = module.model
    assert model is not None
    for batch in data.val_dataloader():
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[:, :-1].double().flatten(0, 1)
        targets = batch["labels"][:, 1:].flatten()
        nats += float(cross_entropy(logits, targets, reduction="sum"))
        counts.append(int((targets != -100).sum()))
    assert len(set(counts)) > 1
    assert metrics["validation/loss"] == pytest.approx(nats / sum(counts), rel=1e-5)
    assert metrics["validation/perplexity"] == pytest.approx(math.exp(nats / sum(counts)), rel=1e-5)
    (again,) = trainer.validate(module, datamodule=data, verbose=False)
    assert again == metrics


@pytest.mark.parametrize(
    ("level", "message"), [(1, r"level 3 for model\.layers\.0\."), (None, "no fold plan")]
)
def test_a_checkpoint_holds_its_plan_and_resumes_with_no_other(
    job: Job, tmp_path: Path, level: int | None, message: str
) -> None:
    path = tmp_path / "1.ckpt"
    fit(job, job.uniform_plan(3), Watch(tmp_path), max_steps=1)
    content = read_checkpoint(path)
    assert FoldPlan.from_json(content["fold_plan"]) == job.uniform_plan(3)
    if level is None:
        del content["fold_plan"]
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        fit(job, job.uniform_plan(level or 3), Watch(), resume_from=path, max_steps=2)


def test_a_plan_of_another_model_is_refused(new_job: NewJob) -> None:
    plan = new_job(model={"num_hidden_layers": 3}).uniform_plan(1)
    with pytest.raises(PlanError, match="num_hidden_layers 3"):
        new_job().new_module().set_plan(plan)


def test_training_without_a_plan_or_a_model_is_refused(job: Job) -> None:
    with pytest.raises(ConfigError, match=r"call configure_model\(\) first"):
        job.new_module().layers()
    module = job.new_module()
    module.configure_model()
    with pytest.raises(ConfigError, match=r"call set_plan\(plan\)"):
        module.mean_loss(torch.zeros(1, 4, 32), torch.zeros(1, 4, dtype=torch.int64))


def test_a_uniform_plan_takes_the_scale_of_its_level(new_job: NewJob) -> None:
    job = new_job(model={"scale": 0.3, "unfolded_scale": 0.2, "lr": 0.5, "exclude": "embed|head|q"})
    for level, scale in ((0, 0.2), (4, 0.3)):
        plan = job.uniform_plan(level)
        assert (plan.scales, plan.lr) == (dict.fromkeys(plan.levels, scale), 0.5)
        assert len(plan.levels) == 2 * 6
        assert not any("q_proj" in name for name in plan.levels)

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from foam_lightning.checkpoint.load import (
    load_module,
    load_tokenizer,
    read_checkpoint,
    run_folder_of,
)
from foam_lightning.errors import CheckpointError
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.training import train, versions
from tests.support.runs import (
    STEPS,
    Finished,
    NewJob,
    StopAfter,
    StopError,
    final_weights,
    open_folder,
    small,
    validation_loss,
)


def test_training_returns_its_results(finished: Finished) -> None:
    job, plan, _, trained = finished
    assert 1 < trained.final_validation_loss < math.log(300)
    assert trained.validation_tokens == 20 * 15
    assert trained.tokens_per_second is not None
    assert trained.tokens_per_second > 100
    predicted = job.new_accountant().account(plan).peak_bytes
    assert trained.measured_peak_bytes == pytest.approx(predicted, rel=0.1)


def test_the_events_contain_the_losses_and_the_learning_rate(finished: Finished) -> None:
    _, _, folder, trained = finished
    events = EventAccumulator(str(folder.path), size_guidance={"scalars": 0}).Reload()
    assert len(events.Scalars("train/loss")) == STEPS
    losses = [event.value for event in events.Scalars("validation/loss")]
    assert len(losses) == STEPS // 4 + 1  # every fourth step, and at the end
    assert losses[-1] == pytest.approx(trained.final_validation_loss)
    perplexity = events.Scalars("validation/perplexity")[-1].value
    assert perplexity == pytest.approx(math.exp(trained.final_validation_loss), rel=1e-5)
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    assert max(rates) == pytest.approx(0.01)


@pytest.mark.parametrize("packing", [True, False])
def test_the_logged_loss_is_the_mean_over_all_micro_batches(
    packing: bool, new_job: NewJob, tmp_path: Path
) -> None:
    text = tmp_path / "rows.jsonl"  # of 4 to 60 characters, so that short rows are padded
    rows = [json.dumps({"text": "ab c" * (1 + i % 15)}) for i in range(64)]
    text.write_text("\n".join(rows), encoding="utf-8")

    def logged(micro_batch_size: int) -> list[float]:
        data = {"micro_batch_size": micro_batch_size, "packing": packing, "files": [str(text)]}
        job = new_job(data=data, trainer={"max_steps": 3})
        folder = open_folder(tmp_path / str(micro_batch_size))
        train(job, job.configured_plan(), folder)
        events = EventAccumulator(str(folder.path), size_guidance={"scalars": 0}).Reload()
        return [event.value for event in events.Scalars("train/loss")]

    losses = logged(8)
    assert len(losses) == 3
    assert logged(2) == pytest.approx(losses, rel=1e-4)


def test_the_last_checkpoint_is_of_the_last_step(finished: Finished) -> None:
    _, plan, folder, _ = finished
    content = read_checkpoint(folder.last_checkpoint)
    assert content["global_step"] == STEPS
    assert FoldPlan.from_json(content["fold_plan"]) == plan
    assert run_folder_of(folder.last_checkpoint).path == folder.path.resolve()


def test_a_checkpoint_alone_restores_model_and_tokenizer(finished: Finished) -> None:
    job, plan, folder, trained = finished
    module = load_module(folder.last_checkpoint)
    assert module.plan == plan
    assert module.model is not None
    found = validation_loss(module.model.model, module.model.lm_head, job)
    assert found == pytest.approx(trained.final_validation_loss, abs=1e-5)
    text = "12 and 47 make 36."
    expected = job.new_data(job.memory_options).tokenizer(text)["input_ids"]
    assert load_tokenizer(folder.last_checkpoint)(text)["input_ids"] == expected


def test_the_exported_folder_has_the_loss_of_the_run(finished: Finished) -> None:
    job, _, folder, trained = finished
    model = AutoModelForCausalLM.from_pretrained(folder.hf)
    found = validation_loss(model.model, model.lm_head, job)
    assert found == pytest.approx(trained.final_validation_loss, abs=1e-3)


def test_a_killed_run_resumes_exactly(finished: Finished, new_job: NewJob, tmp_path: Path) -> None:
    job, plan, whole, expected = finished
    broken = open_folder(tmp_path)
    with pytest.raises(StopError):
        train(small(new_job, callbacks=[StopAfter(7)]), plan, broken)
    assert read_checkpoint(broken.last_checkpoint)["global_step"] == 6
    found = train(job, plan, broken)
    assert found.final_validation_loss == expected.final_validation_loss
    for name, tensor in final_weights(whole).items():
        assert torch.equal(tensor, final_weights(broken)[name]), name
    assert sorted(p.name for p in broken.checkpoints.iterdir()) == ["last.ckpt"]


# Lightning then forgets the best checkpoints, and this run has none but the last.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_finished_run_is_only_validated_again(finished: Finished, tmp_path: Path) -> None:
    job, plan, folder, trained = finished
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(folder.path, copy.path)
    again = train(job, plan, copy)
    assert again.measured_peak_bytes is None
    assert again.tokens_per_second is None
    assert again.final_validation_loss == trained.final_validation_loss


@pytest.mark.parametrize(("change", "key"), [({"lr": 0.5}, "lr"), ({"scales": {}}, "scales")])
def test_a_checkpoint_of_another_plan_is_refused(
    finished: Finished, change: dict[str, Any], key: str
) -> None:
    job, plan, folder, _ = finished
    with pytest.raises(CheckpointError, match=f"another plan: {key} differ"):
        train(job, replace(plan, **change), folder)


def test_the_versions_are_of_what_the_result_depends_on() -> None:
    assert {"python", "torch", "lightning", "transformers"} <= set(versions())

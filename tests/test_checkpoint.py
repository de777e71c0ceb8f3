"""A checkpoint alone is enough to load its model; what is none is refused in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foam_lightning.checkpoint.load import load_module, load_tokenizer, read_checkpoint
from foam_lightning.errors import CheckpointError
from tests.runs import Finished, validation_loss


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


def break_weights(content: dict[str, Any]) -> dict[str, Any]:
    content["state_dict"]["model.lm_head.weight"] = torch.zeros(3, 3)
    return content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: None, "no checkpoint"),
        (lambda _: b"", "not a checkpoint"),
        (lambda _: b"text", "not a checkpoint"),
        (lambda _: {"state_dict": {}}, "not a checkpoint of this tool"),
        (lambda content: {**content, "state_dict": 1}, "weights"),
        (lambda content: {**content, "fold_plan": 1}, "fold plan"),
        (lambda content: {**content, "hyper_parameters": 1}, "hyper_parameters"),
        (break_weights, "do not fit its model"),
    ],
    ids=["absent", "empty", "text", "other", "weights", "plan", "settings", "shapes"],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(
    finished: Finished, tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    path = tmp_path / "copy.ckpt"
    content = change(read_checkpoint(finished.folder.last_checkpoint))
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_module(path)
    assert "copy.ckpt" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_outside_its_folder_has_no_tokenizer(
    finished: Finished, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoints" / "copy.ckpt"
    path.parent.mkdir()
    path.write_bytes(finished.folder.last_checkpoint.read_bytes())
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        load_tokenizer(path)

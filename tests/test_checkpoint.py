from pathlib import Path

import pytest
import torch

from foam_lightning.checkpoint.load import load_module, load_tokenizer, read_checkpoint
from foam_lightning.errors import CheckpointError
from tests.runs import Finished, validation_loss


@pytest.fixture
def checkpoint(finished: Finished, tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "copy.ckpt"
    path.parent.mkdir()
    path.write_bytes(finished.folder.last_checkpoint.read_bytes())
    return path


def test_a_checkpoint_alone_gives_model_and_tokenizer_back(finished: Finished) -> None:
    job, plan, folder, trained = finished
    module = load_module(folder.last_checkpoint)
    assert module.plan == plan
    assert module.model is not None
    found = validation_loss(module.model.model, module.model.lm_head, job)
    assert found == pytest.approx(trained.final_validation_loss, abs=1e-5)
    data = job.new_data(job.memory_options)
    text = "12 and 47 make 36."
    expected = data.tokenizer(text)["input_ids"]
    assert load_tokenizer(folder.last_checkpoint)(text)["input_ids"] == expected


@pytest.mark.parametrize("content", [b"", b"text", None], ids=["empty", "text", "absent"])
def test_what_is_no_checkpoint_is_one_line(checkpoint: Path, content: bytes | None) -> None:
    checkpoint.unlink()
    if content is not None:
        checkpoint.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"copy\.ckpt") as caught:
        read_checkpoint(checkpoint)
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_of_another_tool_is_refused(checkpoint: Path) -> None:
    torch.save({"state_dict": {}}, checkpoint)
    with pytest.raises(CheckpointError, match="not a checkpoint of this tool"):
        read_checkpoint(checkpoint)


def test_weights_that_do_not_fit_their_model_are_one_line(checkpoint: Path) -> None:
    content = read_checkpoint(checkpoint)
    content["state_dict"]["model.lm_head.weight"] = torch.zeros(3, 3)
    torch.save(content, checkpoint)
    with pytest.raises(CheckpointError, match="do not fit its model") as caught:
        load_module(checkpoint)
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_that_lacks_its_weights_is_refused(checkpoint: Path) -> None:
    content = read_checkpoint(checkpoint)
    del content["state_dict"]
    torch.save(content, checkpoint)
    with pytest.raises(CheckpointError, match=r"copy\.ckpt"):
        load_module(checkpoint)


def test_a_checkpoint_out_of_its_folder_has_no_tokenizer(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no tokenizer in"):
        load_tokenizer(checkpoint)

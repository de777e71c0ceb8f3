"""Rotary embeddings of every type train as transformers has them, and rows beyond are said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import cli
from foam_lightning.errors import ConfigError
from foam_lightning.memory.trace import fake_tensors
from foam_lightning.model.llama import save_model
from foam_lightning.model.pretrained import read_config
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import MemoryOptions
from foam_lightning.settings import ModelSettings
from tests.support.pretrained import TINY, load_tokenizer, save_pretrained, save_tokenizer
from tests.support.tiny import write_settings

FACTORS = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
ROTATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "llama3": {
        **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 8,
    },
    "longrope": {**FACTORS, "original_max_position_embeddings": 16},
}
DECLARED = TINY["max_position_embeddings"]


def save_rotated(folder: Path, kind: str) -> Path:
    torch.manual_seed(5)
    rotation = {"rope_type": kind, "rope_theta": 100.0, **ROTATIONS[kind]}
    config = transformers.LlamaConfig(**TINY, rope_parameters=rotation)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path) -> LlamaFoam:
    module = LlamaFoam(ModelSettings(pretrained=str(folder)))
    module.configure_model()
    return module


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("length", [8, DECLARED])
def test_rows_train_as_in_transformers(kind: str, length: int, tmp_path: Path) -> None:
    folder = save_rotated(tmp_path, kind)
    ids = torch.arange(2 * length).view(2, length) % TINY["vocab_size"]
    theirs = AutoModelForCausalLM.from_pretrained(folder).model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(load(folder).hidden_states(ids), theirs)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_every_type_is_traced_without_weights(kind: str, tmp_path: Path) -> None:
    module = LlamaFoam(ModelSettings(pretrained=str(save_rotated(tmp_path, kind))))
    with fake_tensors("32-true"):
        traced = module.build_for_trace(MemoryOptions(micro_batch_size=2), num_layers=1)
        assert traced.hidden_states(torch.zeros(2, DECLARED, dtype=torch.int64)).shape[1] == 32


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_rows_beyond_what_a_scaling_was_made_for_are_refused(kind: str, tmp_path: Path) -> None:
    module = load(save_rotated(tmp_path, kind))
    with pytest.raises(ConfigError, match=f"{DECLARED} or less"):
        module.hidden_states(torch.zeros(1, DECLARED + 1, dtype=torch.int64))


def test_what_is_exported_still_rotates_by_length(tmp_path: Path) -> None:
    folder = save_rotated(tmp_path / "model", "dynamic")
    save_tokenizer(tmp_path / "tokenizer", template=None)
    module = load(folder)
    module.hidden_states(torch.zeros(1, DECLARED, dtype=torch.int64))
    assert module.model is not None
    save_model(module.model, load_tokenizer(tmp_path / "tokenizer"), tmp_path / "hf")
    ids = torch.arange(2 * DECLARED).view(1, -1) % TINY["vocab_size"]
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(one)(input_ids=ids).logits
        for one in (tmp_path / "hf", folder)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_pretrained", [False, True])
def test_longer_rows_are_said_and_the_export_declares_them(
    is_pretrained: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(write_settings(tmp_path)), "--trainer.max_steps", "1"]
    if is_pretrained:
        folder = save_pretrained(tmp_path / "pretrained", "llama-2")
        words += ["--model.pretrained", str(folder), "--data.sequence_length", "160"]
        declared = read_config(str(folder)).max_position_embeddings
    else:
        declared = 100
        words += ["--model.max_position_embeddings", "100", "--data.sequence_length", "160"]
    assert cli.main(["fit", *words]) == 0
    assert f"rows of 160 tokens exceed the {declared} positions" in capfd.readouterr().out
    run = tmp_path / "runs/default/version_0"
    checkpoint, output = run / "checkpoints/last.ckpt", tmp_path / "exported"
    assert cli.main(["export", "--ckpt_path", str(checkpoint), "--output", str(output)]) == 0
    for folder in (run / "hf", output):
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert content["max_position_embeddings"] == 160

"""A local Hugging Face folder: whether it is whole, and that a check says what loading says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from foam_lightning.errors import CheckpointError
from foam_lightning.model import pretrained
from tests.pretrained import FAMILIES, save_pretrained, set_config
from tests.test_model import TINY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a LLaMA folder by transformers alone."""
    torch.manual_seed(5)
    config = LlamaConfig(**TINY, rope_theta=5000.0, rms_norm_eps=1e-5)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_loading_takes_the_default_dtype(folder: Path) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = pretrained.load(str(folder))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def cut_off(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def split(folder: Path) -> Path:
    """Save the model in several files, and give the last of them."""
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")
    return sorted(folder.glob("*.safetensors"))[-1]


def with_biases(folder: Path) -> None:
    """Give the first layer biases that its configuration knows nothing of, as those of Qwen2."""
    weights = load_file(folder / "model.safetensors")
    for role in "qk":
        weights[f"model.layers.0.self_attn.{role}_proj.bias"] = torch.ones(8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no folder": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "config cut off": lambda folder: cut_off(folder / "config.json", 20),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut off": lambda folder: cut_off(folder / "model.safetensors", 5000),
    "weights empty": lambda folder: cut_off(folder / "model.safetensors", 0),
    "other architecture": lambda folder: GPT2Config().save_pretrained(folder),
    "unknown architecture": lambda folder: set_config(folder, model_type="unheard-of"),
    "code of its own": lambda folder: set_config(folder, auto_map={"AutoModel": "own.Model"}),
    "no object": lambda folder: (folder / "config.json").write_text("[]"),
    "sizes that do not fit": lambda folder: set_config(folder, num_attention_heads="four"),
    "no second file": lambda folder: split(folder).unlink(),
    "more weights": lambda folder: with_biases(folder),
    "other shapes": lambda folder: set_config(folder, intermediate_size=40),
    "more layers": lambda folder: set_config(folder, num_hidden_layers=3),
}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", r"llama has no config\.json; pass a local"),
        ("no folder", r"llama has no config\.json; pass a local"),
        ("config cut off", r"cannot read .*config\.json"),
        ("no weights", "cannot load the weights in .*llama"),
        ("weights cut off", "cannot load the weights in .*llama"),
        ("weights empty", "cannot load the weights in .*llama"),
        ("other architecture", "holds a gpt2 model; only llama, mistral and qwen2 are supported"),
        ("unknown architecture", "holds a unheard-of model; only llama"),
        (
            "code of its own",
            r"config.json asks for code of its own \(auto_map in .* always refused",
        ),
        ("no object", r"cannot read .*config\.json"),
        ("sizes that do not fit", r"cannot read .*config\.json"),
        ("no second file", "cannot load the weights in .*llama"),
        ("more weights", r"has 2 weights that its config\.json has no place for, the first is mod"),
        ("other shapes", r"layers\.0\.mlp\.down_proj\.weight of shape \(16, 24\), .*\(16, 40\)"),
        ("more layers", r"lacks 9 weights, the first is model\.layers\.2\."),
    ],
)
@pytest.mark.parametrize("read", [pretrained.load, pretrained.check_weights], ids=["load", "check"])
def test_a_folder_that_is_no_llama_is_one_line(
    folder: Path, how: str, message: str, read: Callable[[str], object]
) -> None:
    DAMAGE[how](folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def as_bin(folder: Path) -> dict[str, Tensor]:
    """Take the weights out of their file, to be written as before safetensors."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return weights


def without_head(folder: Path) -> None:
    """Leave the names out that a model without its head lacks."""
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})


def with_rotation(folder: Path) -> None:
    """Add the buffer that folders of older versions hold."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


WHOLE: dict[str, Callable[[Path], object]] = {
    "one file": lambda folder: None,
    "several files": split,
    "before safetensors": lambda folder: torch.save(as_bin(folder), folder / "pytorch_model.bin"),
    "before torch 1.6": lambda folder: torch.save(
        as_bin(folder), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    ),
    "names of the decoder": without_head,
    "old buffer": with_rotation,
}


@pytest.mark.parametrize("how", WHOLE)
def test_what_loads_passes_the_check(folder: Path, how: str) -> None:
    WHOLE[how](folder)
    pretrained.check_weights(str(folder))
    pretrained.load(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_of_every_family_pass_the_check(family: str, tmp_path: Path) -> None:
    pretrained.check_weights(str(save_pretrained(tmp_path, family)))


def test_a_damaged_file_from_before_safetensors_is_one_line(folder: Path) -> None:
    torch.save(as_bin(folder), folder / "pytorch_model.bin")
    cut_off(folder / "pytorch_model.bin", 3000)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is missing, truncated or dama"):
        pretrained.check_weights(str(folder))

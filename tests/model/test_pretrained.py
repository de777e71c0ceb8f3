"""Local Hugging Face folders: loading them, and that the check agrees with loading."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaForCausalLM

from foam_lightning.errors import CheckpointError
from foam_lightning.model import pretrained
from tests.support.pretrained import FAMILIES, save_pretrained, save_tiny_llama, set_config


@pytest.fixture
def folder(tmp_path):
    return save_tiny_llama(tmp_path)


def test_loading_uses_the_default_dtype(folder):
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = pretrained.load_pretrained(str(folder))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def cut_off(file, size):
    file.write_bytes(file.read_bytes()[:size])


def split(folder):
    """Save the model in several files, and return the last of them."""
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")
    return sorted(folder.glob("*.safetensors"))[-1]


def with_biases(folder):
    """Add biases to the first layer that its configuration lacks, as Qwen2 has them."""
    weights = load_file(folder / "model.safetensors")
    for role in "qk":
        weights[f"model.layers.0.self_attn.{role}_proj.bias"] = torch.ones(8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


LOAD_ERROR = r"cannot load the weights in .*llama"
READ_ERROR = r"cannot read .*config\.json"
DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
    "no folder": (lambda folder: folder.rename(folder.with_name("elsewhere")), r"no config\.json"),
    "config cut off": (lambda folder: cut_off(folder / "config.json", 20), READ_ERROR),
    "no object": (lambda folder: (folder / "config.json").write_text("[]"), READ_ERROR),
    "invalid sizes": (lambda folder: set_config(folder, num_attention_heads="four"), READ_ERROR),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), LOAD_ERROR),
    "weights cut off": (lambda folder: cut_off(folder / "model.safetensors", 5000), LOAD_ERROR),
    "weights empty": (lambda folder: cut_off(folder / "model.safetensors", 0), LOAD_ERROR),
    "no second file": (lambda folder: split(folder).unlink(), LOAD_ERROR),
    "other architecture": (lambda folder: GPT2Config().save_pretrained(folder), "gpt2 .*qwen2"),
    "capped attention": (lambda folder: set_config(folder, model_type="gemma2"), "gemma2 .*qwen3"),
    "capped logits": (
        lambda folder: set_config(folder, model_type="gemma3_text", final_logit_softcapping=30.0),
        r"final_logit_softcapping 30\.0, .*gemma3_text",
    ),
    "later tokens": (
        lambda folder: set_config(folder, model_type="gemma", use_bidirectional_attention=True),
        "use_bidirectional_attention True",
    ),
    "unknown architecture": (lambda folder: set_config(folder, model_type="unheard"), "unheard"),
    "custom code": (
        lambda folder: set_config(folder, auto_map={"AutoModel": "own.Model"}),
        "custom code .*never run",
    ),
    "more weights": (lambda folder: with_biases(folder), r"has 2 weights .*first is model\."),
    "other shapes": (
        lambda folder: set_config(folder, intermediate_size=40),
        r"layers\.0\.mlp\.down_proj.*\(16, 24\), .*\(16, 40\)",
    ),
    "more layers": (
        lambda folder: set_config(folder, num_hidden_layers=3),
        r"lacks 9 weights, .* model\.layers\.2\.",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("read", ["load_pretrained", "check_weights"])
def test_a_damaged_folder_is_refused_in_one_line(folder, damage, read):
    break_, message = DAMAGE[damage]
    break_(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        getattr(pretrained, read)(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def as_bin(folder):
    """Load the weights and delete their file, to be saved as before safetensors."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return weights


def without_head(folder):
    """Rename the weights as a model without its head saves them."""
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})


def with_rotation(folder):
    """Add the buffer that older versions saved."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


WHOLE = {
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
def test_a_folder_that_loads_passes_the_check(folder, how):
    WHOLE[how](folder)
    pretrained.check_weights(str(folder))
    pretrained.load_pretrained(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_of_every_family_pass_the_check(family, tmp_path):
    pretrained.check_weights(str(save_pretrained(tmp_path, family)))


def test_a_damaged_file_from_before_safetensors_is_refused(folder):
    torch.save(as_bin(folder), folder / "pytorch_model.bin")
    cut_off(folder / "pytorch_model.bin", 3000)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin .*truncated"):
        pretrained.check_weights(str(folder))

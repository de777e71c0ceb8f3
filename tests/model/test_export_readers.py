"""What readers of an exported folder take from it: vLLM, and transformers before 5.

vLLM reads config.json by transformers' own classes, standardizes the rotation
(`patch_rope_parameters` in its transformers_utils/config.py), and takes sizes by these names
(models/llama.py), checked on its sources of versions 0.6 to 0.24. Neither can be installed beside
transformers 5.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from foam_lightning.model.llama import save_model
from foam_lightning.model.pretrained import create_model
from foam_lightning.settings import ModelSettings
from tests.support.pretrained import CHAT_TEMPLATE, FAMILIES, save_pretrained, save_tokenizer

SIZES = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
SIZES |= {"num_key_value_heads", "vocab_size", "max_position_embeddings"}


@pytest.fixture(scope="module", params=[*FAMILIES, None])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """Export a model of each family, and one without a folder; return its configuration too."""
    folder = tmp_path_factory.mktemp("exported")
    pretrained = request.param and str(save_pretrained(folder / "before", request.param))
    model = create_model(ModelSettings(pretrained=pretrained), None, seed=0)
    save_tokenizer(folder / "tokenizer", template=CHAT_TEMPLATE)
    save_model(model, AutoTokenizer.from_pretrained(folder / "tokenizer"), folder / "hf")
    model.config.architectures = [type(model).__name__]
    return folder / "hf", model.config


def read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return content


def test_vllm_finds_the_model_and_its_rotation(exported: tuple[Path, Any]) -> None:
    folder, trained = exported
    config = AutoConfig.from_pretrained(folder)
    rotation = dict(trained.rope_parameters)
    assert config.rope_parameters == rotation
    config.rope_theta = getattr(config, "rope_theta", None)  # as it does
    config.standardize_rope_params()
    config.validate_rope()
    assert config.rope_parameters == rotation
    assert config.architectures == trained.architectures
    assert config.dtype == torch.float32
    assert {name: getattr(config, name) for name in SIZES} == {
        name: getattr(trained, name) for name in SIZES
    }
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        output = file.get_tensor("model.layers.0.self_attn.o_proj.weight")
    assert output.shape == (config.hidden_size, heads * head_dim)
    assert ("lm_head.weight" in names) is not config.tie_word_embeddings
    stop = GenerationConfig.from_pretrained(folder).eos_token_id
    assert stop == AutoTokenizer.from_pretrained(folder).eos_token_id


def test_older_versions_find_every_name_that_they_know(exported: tuple[Path, Any]) -> None:
    folder, trained = exported
    config, tokenizer = read(folder, "config.json"), read(folder, "tokenizer_config.json")
    rotation = dict(trained.rope_parameters)
    if "rope_theta" in rotation:  # unless each type of layer has its own, as in Gemma 3
        assert config["rope_theta"] == rotation.pop("rope_theta")
        assert config["rope_scaling"] == (None if rotation["rope_type"] == "default" else rotation)
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["tie_word_embeddings"] is trained.tie_word_embeddings
    assert config.keys() >= SIZES | {"architectures", "model_type", "rms_norm_eps"}
    # transformers 4 fails on the name TokenizersBackend, and on a list of extra special tokens.
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)
    before = AutoTokenizer.from_pretrained(folder.parent / "tokenizer")
    after = AutoTokenizer.from_pretrained(folder)
    text = "one <|start|>two<|end|>"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    # A Qwen2 tokenizer also has a token to pad with.
    assert set(after.all_special_tokens) >= set(before.all_special_tokens)
    assert after.chat_template == before.chat_template

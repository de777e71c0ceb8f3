"""GGUF files, read back by the package gguf and by transformers."""

import math

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from foam_lightning.errors import CheckpointError
from foam_lightning.model.gguf import save_gguf
from tests.support.pretrained import FAMILIES, load_tokenizer, save_pretrained

TEXT = "import argparse\nclass Parser: pass"


def load(tmp_path, family):
    folder = save_pretrained(tmp_path / family, family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, load_tokenizer(folder)


def field(reader, name):
    return reader.get_field(name).contents()


def dequantized(reader):
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(
            tuple(reversed(tensor.shape.tolist()))
        )
        for tensor in reader.tensors
    }


def pairs_to_halves(rows, num_heads):
    """Undo llama.cpp's order of query and key rows, as transformers does when it reads GGUF."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


# What this package does not write, though llama.cpp has it.
NOT_WRITTEN = ("smollm3", "gemma", "gemma3")


@pytest.mark.parametrize("family", NOT_WRITTEN)
def test_other_families_are_refused_with_the_list_of_those_that_work(tmp_path, family):
    model, tokenizer = load(tmp_path, family)
    with pytest.raises(CheckpointError, match=r"llama, .*qwen3, phi3"):
        save_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("family", [one for one in FAMILIES if one not in NOT_WRITTEN])
@pytest.mark.parametrize(("dtype", "step"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_every_weight_is_read_back(tmp_path, family, dtype, step):
    model, tokenizer = load(tmp_path, family)
    save_gguf(model, tokenizer, tmp_path / "model.gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    architecture = field(reader, "general.architecture")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 2)
    found = dequantized(reader)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        rows = found.pop(names.get_name(name, try_suffixes=(".weight", ".bias")))
        heads = {"q_proj": 4, "k_proj": model.config.num_key_value_heads}
        num_heads = heads.get(name.split(".")[-2])
        if num_heads is not None and architecture == "llama":
            rows = pairs_to_halves(rows, num_heads)
        np.testing.assert_allclose(rows, tensor.numpy(), rtol=step, atol=1e-6)
    assert found.keys() == ({"rope_freqs.weight"} if family.startswith("llama-3") else set())


@pytest.mark.parametrize("family", ["llama-2", "tinyllama", "qwen2", "qwen3", "phi3"])
def test_transformers_computes_the_same_logits(tmp_path, family):
    model, tokenizer = load(tmp_path, family)
    save_gguf(model.to(torch.float16), tokenizer, tmp_path / "model.gguf", "float16")
    loaded = AutoModelForCausalLM.from_pretrained(
        # The sizes of heads and the token to pad with are not those of so small a model there.
        tmp_path,
        gguf_file="model.gguf",
        config=model.config,
        dtype=torch.float32,
    )
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.float()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_q8_0_stores_blocks_of_32_and_other_rows_in_float16(tmp_path):
    model, tokenizer = load(tmp_path, "llama-2")  # rows of 32, and of 44 in down_proj
    save_gguf(model, tokenizer, tmp_path / "model.gguf", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_v.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["output_norm.weight"] == "F32"
    weight = model.state_dict()["model.layers.0.self_attn.v_proj.weight"].numpy()
    # Half a step of a block, its largest magnitude over 127, and the float16 of its scale.
    largest = np.abs(weight.reshape(-1, 32)).max(axis=1)
    error = np.abs(dequantized(reader)["blk.0.attn_v.weight"] - weight).reshape(-1, 32).max(axis=1)
    assert (error <= largest * (0.5 / 127 + 2**-11)).all()


def test_the_tokenizer_is_read_back(tmp_path):
    model, tokenizer = load(tmp_path, "llama-3.1")
    save_gguf(model, tokenizer, tmp_path / "model.gguf", end_of_turn=3)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == model.config.vocab_size > len(tokenizer)
    vocabulary = tokenizer.get_vocab()
    assert {token: index for index, token in enumerate(tokens) if token in vocabulary} == vocabulary
    kinds = field(reader, "tokenizer.ggml.token_type")
    assert kinds[0] == kinds[1] == gguf.TokenType.CONTROL
    assert kinds[len(tokenizer) - 1] == gguf.TokenType.NORMAL
    assert kinds[-1] == gguf.TokenType.UNUSED
    assert (field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre")) == (
        "gpt2",
        "gpt-2",
    )
    assert field(reader, "tokenizer.ggml.bos_token_id") == 0
    assert field(reader, "tokenizer.ggml.eos_token_id") == 1
    assert field(reader, "tokenizer.ggml.eot_token_id") == 3
    assert field(reader, "tokenizer.chat_template") == tokenizer.chat_template
    assert "o n" in field(reader, "tokenizer.ggml.merges")
    assert field(reader, "llama.rope.freq_base") == 500000.0
    # The shortest wavelength lies between 16 / 4 and 16 / 1, where the factors interpolate.
    factors = dequantized(reader)["rope_freqs.weight"]
    smooth = (16 / (2 * math.pi) - 1) / (4 - 1)
    assert factors[0] == pytest.approx(1 / ((1 - smooth) / 8 + smooth))
    assert factors[-1] == pytest.approx(8)


def test_a_tokenizer_of_sentencepiece_has_scores_in_the_order_of_its_merges(tmp_path):
    model, _ = load(tmp_path, "llama-2")
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "a", "b", "ab", "aba"]
    merges = [("a", "b"), ("ab", "a")]
    backend = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            merges,
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Prepend("▁")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    save_gguf(model, tokenizer, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert field(reader, "tokenizer.ggml.model") == "llama"
    assert field(reader, "tokenizer.ggml.tokens")[:8] == tokens
    scores = field(reader, "tokenizer.ggml.scores")
    assert scores[6] > scores[7] > scores[4]
    kinds = [gguf.TokenType(kind).name for kind in field(reader, "tokenizer.ggml.token_type")[:6]]
    assert kinds == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE", "NORMAL", "NORMAL"]
    assert field(reader, "tokenizer.ggml.add_space_prefix") is True


def test_what_gguf_cannot_express_is_one_line_and_leaves_no_file(tmp_path):
    model, tokenizer = load(tmp_path, "llama-2")

    def refused(expected):
        with pytest.raises(CheckpointError, match=expected):
            save_gguf(model, tokenizer, tmp_path / "model.gguf", "float16")
        assert not list(tmp_path.glob("model.gguf*"))

    rope, model.config.rope_parameters = model.config.rope_parameters, {"rope_type": "yarn"}
    refused("yarn")
    model.config.rope_parameters = rope
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    refused("lm_head.*65504.*bfloat16")
    model.config.model_type = "gemma"
    refused("gemma")

"""Write a model as a GGUF file, which llama.cpp, Ollama and LM Studio load.

The package gguf of llama.cpp writes the file and names the tensors; the order of query and key
rows, the scores of tokens and the names of text splits are those of llama.cpp's
convert_hf_to_gguf.py. Tensors are converted one at a time, so that host memory holds the model and
one converted tensor.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from foam_lightning.errors import CheckpointError
from foam_lightning.model.int8_weights import plain_state
from foam_lightning.storage.atomic import atomic_path

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

GgufDtype = Literal["bfloat16", "float16", "q8_0"]

_ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "phi3": "PHI3",
}
# By the pattern that splits text into words, llama.cpp's name of it.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def save_gguf(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    path: Path,
    dtype: GgufDtype = "bfloat16",
    *,
    end_of_turn: int | None = None,
) -> None:
    """Write model and tokenizer as one GGUF file, atomically.

    Matrices are stored in `dtype`, vectors in float32. q8_0 stores 32 neighbouring weights in int8
    with one float16 scale; a matrix whose rows are no multiple of 32 is stored in float16 instead.

    Args:
        model: A model of transformers; `_ARCHITECTURES` lists those that GGUF is written of.
        tokenizer: Its tokenizer, with byte-level BPE or the BPE of SentencePiece.
        path: The file to write.
        dtype: "bfloat16", "float16" or "q8_0".
        end_of_turn: The token that ends a message of the assistant, for a chat model.

    Raises:
        CheckpointError: The package gguf is missing, or GGUF cannot express the model.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError("--format gguf needs the package gguf; pip install gguf") from None
    config = model.config
    if config.model_type not in _ARCHITECTURES:
        raise CheckpointError(
            f"GGUF cannot be written for model type {config.model_type!r}, only for "
            f"{', '.join(_ARCHITECTURES)}; export without --format gguf"
        )
    architecture = gguf.MODEL_ARCH[_ARCHITECTURES[config.model_type]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = []
    for source, tensor in _tensors(model, architecture == gguf.MODEL_ARCH.LLAMA):
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise CheckpointError(f"GGUF has no name for the weight {source}")
        tensors.append((name, tensor, _type_of(source, tensor, dtype)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture])
        _add_sizes(writer, config, path.stem, dtype)
        _add_tokenizer(writer, tokenizer, config.vocab_size)
        if end_of_turn is not None:
            writer.add_eot_token_id(end_of_turn)
        for name, tensor, kind in tensors:
            shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kind)
            size = int(np.prod(shape))
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), size, raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, tensor, kind in tensors:
                values = tensor.detach().to("cpu", torch.float32).numpy()
                writer.write_tensor_data(gguf.quantize(values, kind).view(np.uint8))
        finally:
            writer.close()


def _type_of(name: str, tensor: Tensor, dtype: GgufDtype) -> "GGMLQuantizationType":
    """Choose the type in which the file stores a tensor.

    Raises:
        CheckpointError: A weight is larger than float16 can store.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if tensor.ndim < 2:
        return GGMLQuantizationType.F32
    if dtype == "bfloat16":
        return GGMLQuantizationType.BF16
    largest = float(tensor.detach().abs().max())
    if not largest <= torch.finfo(torch.float16).max:
        raise CheckpointError(
            f"the weight {name} reaches {largest:.3g}, float16 65504; use --dtype bfloat16"
        )
    block_size, _ = GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0]
    if dtype == "q8_0" and tensor.shape[-1] % block_size == 0:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16


def _tensors(model: Any, interleave: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights with their names in transformers, and RoPE's factors if it has some.

    Args:
        model: The model.
        interleave: Whether to reorder query and key rows, of each head the two halves that RoPE
            rotates together, to pairs of neighbours, as llama.cpp expects them of LLaMA.
    """
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in plain_state(model).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        num_heads = heads.get(name.split(".")[-2])
        if interleave and num_heads is not None:
            halves = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        yield name, tensor
    if _rope(config)["rope_type"] == "llama3":
        yield "rope_freqs.weight", _rope_factors(config)


def _rope(config: "PretrainedConfig") -> dict[str, Any]:
    """Return the RoPE settings.

    Raises:
        CheckpointError: GGUF has no such RoPE.
    """
    rope: dict[str, Any] = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise CheckpointError(
            f"GGUF cannot be written with RoPE of type {rope['rope_type']!r}, only default, linear "
            "or llama3; export without --format gguf"
        )
    return rope


def _rope_factors(config: "PretrainedConfig") -> Tensor:
    """Compute the factor by which each wavelength of RoPE is longer than without scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    unscaled: Tensor = config.rope_parameters["rope_theta"] ** -exponents
    return unscaled / scaled


def _add_sizes(
    writer: "GGUFWriter", config: "PretrainedConfig", name: str, dtype: GgufDtype
) -> None:
    from gguf import LlamaFileType, RopeScalingType

    rope = _rope(config)
    head_size = getattr(config, "head_dim", None)
    head_size = head_size or config.hidden_size // config.num_attention_heads
    file_types = {"bfloat16": "MOSTLY_BF16", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[file_types[dtype]])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type == "phi3":  # llama.cpp reads these of it; 0 is no window
        writer.add_sliding_window(config.sliding_window or 0)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _add_tokenizer(
    writer: "GGUFWriter", tokenizer: "PreTrainedTokenizerBase", vocab_size: int
) -> None:
    """Add vocabulary, merges, special tokens and chat template.

    Raises:
        CheckpointError: llama.cpp has no such tokenizer.
    """
    from gguf import SpecialVocab, TokenType

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        fast = Path(folder, "tokenizer.json")
        content = json.loads(fast.read_text(encoding="utf-8")) if fast.exists() else {}
        split = _split_of(content)
        special = SpecialVocab(folder, load_merges=split is not None, n_vocab=vocab_size)
    # Ids of the model beyond the tokenizer's are never generated.
    tokens = [f"[UNUSED{index}]" for index in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        if index < vocab_size:
            kind = TokenType.BYTE if _BYTE_TOKEN.fullmatch(token) else TokenType.NORMAL
            tokens[index], kinds[index] = token, TokenType.NORMAL if split else kind
    for index, added in tokenizer.added_tokens_decoder.items():
        if index < vocab_size:
            kinds[index] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    if split is None:
        if tokenizer.unk_token_id is not None:
            kinds[tokenizer.unk_token_id] = TokenType.UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, content["model"]["merges"]))
        writer.add_add_space_prefix('"Prepend"' in json.dumps(content["normalizer"]))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special.add_to_gguf(writer, quiet=True)


def _split_of(content: dict[str, Any]) -> str | None:
    """Name how a tokenizer.json splits text, in llama.cpp's words; None for SentencePiece.

    Raises:
        CheckpointError: llama.cpp has no such tokenizer.
    """
    model = content.get("model", {})
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        return None
    splitter = content.get("pre_tokenizer") or {}
    parts = splitter.get("pretokenizers", [splitter])
    patterns = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    is_byte_level = any(part.get("type") == "ByteLevel" for part in parts)
    if model.get("type") == "BPE" and is_byte_level:
        if not patterns:
            return "gpt-2"
        if len(patterns) == 1 and patterns[0] in _SPLITS:
            return _SPLITS[patterns[0]]
    raise CheckpointError(
        "GGUF cannot be written with this tokenizer, only with byte-level BPE that splits text as "
        "GPT-2, Llama 3 or Qwen2 does, or with the BPE of SentencePiece; export without --format "
        "gguf"
    )


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Score tokens as SentencePiece does, by the order in which they are merged."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]

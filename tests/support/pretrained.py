"""Small Hugging Face folders of every family, made by transformers and tokenizers alone."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
VOCABULARY = 320
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY + 8,  # some folders have more rows than tokens
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LLAMA3_ROTATION = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3_8B: dict[str, Any] = {
    **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "max_position_embeddings": 8192,
}
TINY: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "tinyllama": ("Llama", {"num_key_value_heads": 1, "dtype": "bfloat16"}),
    "llama-3.1": ("Llama", {"rope_parameters": _LLAMA3_ROTATION}),
    "llama-3.2": ("Llama", {"rope_parameters": _LLAMA3_ROTATION, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 64, "head_dim": 16}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {"sliding_window": 64, "pad_token_id": None}),
    "smollm3": (
        "SmolLM3",
        {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "pad_token_id": None},
    ),
    "gemma": ("Gemma", {"head_dim": 16, "pad_token_id": None}),
    "gemma3": (
        "Gemma3Text",
        {
            **{"head_dim": 16, "pad_token_id": None, "sliding_window": 64, "num_hidden_layers": 4},
            "layer_types": [*["sliding_attention"] * 3, "full_attention"],
        },
    ),
}
# The class of the model has another name.
_CLASSES = {"Gemma3Text": "Gemma3"}
# Like that of Qwen2: each message is between two special tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path, *, vocab_size: int = VOCABULARY, template: str | None) -> None:
    """Train byte-level BPE on `TEXT`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<s>", "</s>", "<|start|>", "<|end|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def save_pretrained(folder: Path, family: str, *, template: str | None = CHAT_TEMPLATE) -> Path:
    """Save a model of a family, with weights that differ from zero, and its tokenizer."""
    name, settings = FAMILIES[family]
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **settings})
    model = getattr(transformers, f"{_CLASSES.get(name, name)}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if "norm" not in parameter_name:  # biases start at zero, which would hide mistakes
            torch.nn.init.normal_(parameter, std=0.1)
    if family == "llama-3.1":  # several files with an index
        model.save_pretrained(folder, max_shard_size="20KB")
        assert (folder / "model.safetensors.index.json").is_file()
    else:
        model.to(config.dtype or torch.float32).save_pretrained(folder)
    save_tokenizer(folder, template=template)
    return folder


def save_tiny_llama(folder: Path) -> Path:
    """Save a LLaMA model of the sizes `TINY`, by transformers alone."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(**TINY, rope_theta=5000.0, rms_norm_eps=1e-5)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    return folder / "llama"


def set_config(folder: Path, **fields: Any) -> None:
    """Change `config.json`."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

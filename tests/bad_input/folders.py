"""Tokenizer and model folders."""

import json
import shutil
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tests.bad_input.case import Prepare, fit, nothing, reading
from tests.bad_input.checkpoints import Touch


def _copy(name: str, *changes: Callable[[Path], object]) -> Prepare:
    def prepare(at: Path, good: Path) -> None:
        shutil.copytree(good / name, at / "folder")
        for change in changes:
            change(at / "folder")

    return prepare


def _json(file: str, **fields: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**content, **fields}), encoding="utf-8")

    return change


def _written(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def _hostile_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Touch(folder.parent / "hacked")}, folder / "pytorch_model.bin")


def _code(folder: Path) -> None:
    (folder / "evil.py").write_text(
        f"open({str(folder.parent / 'hacked')!r}, 'w')\nclass Evil: ..."
    )


_AUTO = {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil",
         "AutoModelForCausalLM": "evil.Evil"}  # fmt: skip
_HUGE = struct.pack("<Q", 2**60) + b"{}"
FOLDERS = [
    reading(f"tokenizer: {name}", f"--data.tokenizer {{at}}/folder {words}", says, prepare=prepare)
    for name, says, prepare, words in [
        ("an empty folder", "cannot load the tokenizer", lambda at, _: (at / "folder").mkdir(), ""),
        ("a file", "cannot load the tokenizer", lambda at, _: (at / "folder").touch(), ""),
        ("broken JSON", "cannot load the tokenizer",
         _copy("run/tokenizer", _written("tokenizer.json", b"{")), ""),
        ("JSON of something else", "cannot load the tokenizer",
         _copy("run/tokenizer", _written("tokenizer.json", b"[1]")), ""),
        ("a model of no package", "cannot load" if find_spec("sentencepiece") else "pip install",
         _copy("run/tokenizer", lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model")),
         ""),
        ("a larger vocabulary", "model.vocab_size", _copy("run/tokenizer"),
         "--model.vocab_size 300"),
        ("no end of text", "end-of-text",
         _copy("run/tokenizer", _json("tokenizer_config.json", eos_token=None),
               lambda folder: (folder / "special_tokens_map.json").unlink(missing_ok=True)), ""),
        ("code of its own", "tokenizer",
         _copy("run/tokenizer", _code,
               _json("tokenizer_config.json", auto_map=_AUTO, tokenizer_class="Evil")), ""),
    ]
] + [
    fit(f"pretrained: {name}", "--model.pretrained {at}/folder", says, prepare=prepare)
    for name, says, prepare in [
        ("missing", "no config.json", nothing),
        ("an empty folder", "no config.json", lambda at, _: (at / "folder").mkdir()),
        ("broken JSON", "cannot read", _copy("pretrained", _written("config.json", b"{"))),
        ("a list", "cannot read", _copy("pretrained", _written("config.json", b"[1]"))),
        ("deep JSON", "cannot read", _copy("pretrained", _written("config.json", b"[" * 100_000))),
        ("another architecture", "gpt2",
         _copy("pretrained", _json("config.json", model_type="gpt2"))),
        ("a type of a list", "supported",
         _copy("pretrained", _json("config.json", model_type=["llama"]))),
        ("code of its own", "custom code",
         _copy("pretrained", _code, _json("config.json", auto_map=_AUTO))),
        ("a size of a text", "cannot read",
         _copy("pretrained", _json("config.json", hidden_size="big"))),
        *(
            (f"RoPE with {name}", says, _copy("pretrained", _json(
                "config.json", rope_scaling=one, rope_parameters=None)))
            for name, says, one in [
                ("no type", "no rope_type", {"factor": 4.0}),
                ("null for a type", "no rope_type", {"rope_type": None, "factor": 4.0}),
                ("an unknown type", "known are", {"type": "linar", "factor": 4.0}),
                ("no factor", "factor", {"type": "linear"}),
                ("a factor in words", "above 0", {"type": "linear", "factor": "four"}),
                ("a negative factor", "above 0", {"type": "dynamic", "factor": -2.0}),
                ("a factor of 0", "above 0", {"type": "yarn", "factor": 0}),
                ("an infinite factor", "above 0", {"type": "linear", "factor": float("inf")}),
                ("a number alone", "must be a mapping", 4.0),
                ("too few factors", "short_factor", {
                    "type": "longrope", "short_factor": [1.0], "long_factor": [2.0],
                    "original_max_position_embeddings": 16,
                }),
            ]
        ),
        ("capped attention", "supported are", _copy("pretrained", _json(
            "config.json", model_type="gemma2"))),
        ("capped logits", "final_logit_softcapping", _copy("pretrained", _json(
            "config.json", model_type="gemma3_text", final_logit_softcapping=30.0))),
        ("a size of 0", "config.json", _copy("pretrained", _json("config.json", hidden_size=0))),
        ("a negative size", "config.json",
         _copy("pretrained", _json("config.json", num_hidden_layers=-1))),
        ("a missing layer", "model.layers.2.",
         _copy("pretrained", _json("config.json", num_hidden_layers=3))),
        ("too many layers", "config.json",
         _copy("pretrained", _json("config.json", num_hidden_layers=10**9))),
        ("heads that do not divide", "config.json",
         _copy("pretrained", _json("config.json", num_attention_heads=5))),
        ("quantised", "config.json", _copy("pretrained", _json(
            "config.json", quantization_config={"quant_method": "gptq", "bits": 4}))),
        ("another shape", "shape", _copy("pretrained", _json("config.json", intermediate_size=48))),
        ("another vocabulary", "shape", _copy("pretrained", _json("config.json", vocab_size=300))),
        ("no weights", "weights",
         _copy("pretrained", lambda f: (f / "model.safetensors").unlink())),
        ("empty weights", "weights", _copy("pretrained", _written("model.safetensors", b""))),
        ("weights of a text", "weights", _copy("pretrained", _written("model.safetensors", b"hi"))),
        ("a huge header", "weights", _copy("pretrained", _written("model.safetensors", _HUGE))),
        ("weights cut off", "weights", _copy("pretrained", lambda f: (
            f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]))),
        ("a hostile pickle", "weights", _copy("pretrained", _hostile_weights)),
    ]
]  # fmt: skip

"""What people and files get wrong: cases as data, for test_bad_input.

Words and files may name `{at}`, the folder of the case, and `{good}`, a folder of valid things:
tiny.yaml, text.txt, plan.json, run/checkpoints/last.ckpt, tokenizer/ and pretrained/.
"""

import json
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Content = str | bytes
Prepare = Callable[[Path, Path], object]


def nothing(_at: Path, _good: Path) -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Case:
    """A command that must be refused.

    Attributes:
        name: Of the case.
        words: What is typed, split at blanks; a word with a blank in it stands in `more`.
        says: What the line must say.
        code: The exit code.
        more: Further words.
        files: Texts to write, by name.
        prepare: Does the rest, with the folder of the case and that of the valid things.
    """

    name: str
    words: str
    says: str
    code: int = 2
    more: tuple[str, ...] = ()
    files: Mapping[str, Content] = field(default_factory=dict)
    prepare: Prepare = nothing


def _fit(name: str, words: str, says: str, **rest: Any) -> Case:
    return Case(name, f"fit --config {{good}}/tiny.yaml {words}", says, **rest)


def _plan(name: str, words: str, says: str, **rest: Any) -> Case:
    return Case(name, f"plan --config {{good}}/tiny.yaml --uniform-level 1 {words}", says, **rest)


# ---- words

USAGE = [
    Case("unknown command", "train", "there is no command 'train'"),
    Case("misspelt command", "fti", "did you mean fit?"),
    Case("empty command", "", "there is no command ''", more=("",)),
    Case("option for a command", "--memory-budget 24GB", "there is no command"),
    Case("misspelt flag", "fit --trainer.max_step 3", "did you mean --trainer.max_steps?"),
    Case("misspelt flag with =", "fit --model.levle=3", "did you mean --model.level?"),
    Case("abbreviated flag", "fit --conf x.yaml", "did you mean --config?"),
    Case("word without a flag", "fit now", "unrecognized arguments: now"),
    Case("flag of another command", "fit --prompt hello", "--prompt"),
    Case("flag without a value", "fit --name", "--name"),
    Case("last flag without a value", "fit --config", "--config needs a value"),
    Case("section with a file", "fit --model other.yaml", "whole section"),
    Case("section with a mapping", "fit --trainer={}", "whole section"),
    Case("export without an output", "export --ckpt_path x.ckpt", "output"),
    Case("export without a checkpoint", "export --output out", "ckpt_path"),
    Case("generate without a checkpoint", "generate", "ckpt_path"),
    Case("tune without a budget", "tune --config {good}/tiny.yaml", "tune needs --memory-budget"),
    Case("plan without a budget", "plan --config {good}/tiny.yaml", "plan needs --memory-budget"),
    Case("a Unicode dash", "fit —config x.yaml", "unrecognized arguments"),
    Case("unknown format", "plan --format xml --memory-budget 1GB", "format"),
    Case("a key within a number", "fit --model.lr.x 3", "model.lr"),
    Case("NUL in a path", "fit --config", "cannot read", more=("a\0b",)),
    Case("half a surrogate pair", "fit --config", "cannot read", more=("\ud800",)),
]

BUDGETS = [
    Case(f"budget {text!r}", "fit", says, code, more=(f"--memory-budget={text}",))
    for text, says, code in [
        ("", "is not a memory size", 2),
        ("0", "is not a memory size", 2),
        ("0GB", "must be above zero", 2),
        ("-1GB", "is not a memory size", 2),
        ("1e400GB", "is not a memory size", 2),
        ("nan", "is not a memory size", 2),
        ("infGB", "is not a memory size", 2),
        ("24", "is not a memory size", 2),
        ("GB", "is not a memory size", 2),
        ("24 G B", "is not a memory size", 2),
        ("24GBB", "is not a memory size", 2),
        ("24,5GB", "is not a memory size", 2),
        ("1_000GB", "is not a memory size", 2),
        ("٢٤GB", "is not a memory size", 2),  # noqa: RUF001
        ("²GB", "is not a memory size", 2),
        ("24ＧＢ", "is not a memory size", 2),  # noqa: RUF001
        ("0x18GB", "is not a memory size", 2),
        ("24GB\n25GB", "is not a memory size", 2),
        ("9" * 5000 + "GB", "is not a memory size", 2),
        ("1." + "0" * 5000 + "GB", "is not a memory size", 2),
        ("0.1B", "must be above zero", 2),
    ]
]
INFEASIBLE = [
    Case(f"{command} of {size}", f"{command} --config {{good}}/tiny.yaml", "too small", 3,
         more=("--memory-budget", size))
    for command in ("plan", "fit", "tune") for size in ("1B", " 24 kB ")
]  # fmt: skip

# ---- numbers

NUMBERS = [
    _plan(f"{setting} {value}", f"--{setting}={value}", setting.rpartition(".")[2])
    for setting, values in {
        "model.lr": ".nan .inf nan -1 0 high 1e999 1,5 [1] null",
        "model.betas": "0.9 [0.9] [0.9,1.0] [-0.1,0.9] [.nan,0.9] [0.9,0.9,0.9]",
        "model.eps": ".nan .inf nan -1e-8",
        "model.weight_decay": "-0.1 .nan .inf",
        "model.scale": "-1 .nan .inf 0",
        "model.unfolded_scale": "-1 .nan .inf 0",
        "model.residual_scale": "-1 .nan .inf",
        "model.clip_norm": "0 -1 .nan .inf",
        "model.warmup_fraction": "-0.1 1.1 .nan",
        "model.final_lr_fraction": "-0.1 1.1 .nan",
        "model.level": "-1 1.5 1000000000 9223372036854775808",
        "model.hidden_size": "0 -32 33 99999999999999999999",
        "model.intermediate_size": "0 99999999999999999999",
        "model.num_hidden_layers": "0 -1 1000000000",
        "model.num_attention_heads": "0 3 -2",
        "model.num_key_value_heads": "-1 3 0",
        "model.vocab_size": "0 -1 99999999999999999999",
        "model.max_position_embeddings": "0",
        "model.optimizer": "sgd",
        "model.state_dtype": "float64",
        "model.second_moment": "cube",
        "model.exclude": "[ (",
        "data.sequence_length": "0 1 -1 many 99999999999999999999",
        "data.batch_size": "0 -4 99999999999999999999",
        "data.micro_batch_size": "0 3 -1 5",
        "trainer.max_steps": "0 -1 many 1.5 nan",
        "trainer.precision": "8-true",
        "trainer.devices": "0 many",
        "trainer.strategy": "deepspeed",
        "trainer.accumulate_grad_batches": "4",
        "seed_everything": "-1 1.5 99999999999999999999",
        "tune.fraction": "0 -1 .nan .inf",
        "tune.trials": "0",
        "tune.steps": "-1",
        "uniform-level": "-1 99 1000000000000",
        "tensors": "-1 x",
    }.items()
    for value in values.split()
]

# ---- configurations


def _yaml(name: str, content: Content, says: str, **rest: Any) -> Case:
    words = "plan --config {at}/bad.yaml --memory-budget 1GB"
    return Case(f"yaml: {name}", words, says, files={"bad.yaml": content}, **rest)


def _laughs() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for depth in range(1, 12):
        lines.append(f"a{depth}: &a{depth} [{', '.join([f'*a{depth - 1}'] * 9)}]")
    return "\n".join(lines)


def _fifo(at: Path, _good: Path) -> None:
    os.mkfifo(at / "bad.yaml")


def _loop(at: Path, _good: Path) -> None:
    (at / "bad.yaml").symlink_to(at / "bad.yaml")


def _folder(at: Path, _good: Path) -> None:
    (at / "bad.yaml").mkdir()


_READ_BAD = "plan --config {at}/bad.yaml --memory-budget 1GB"
YAML = [
    Case("yaml: missing", _READ_BAD, "No such file"),
    Case("yaml: a folder", _READ_BAD, "no ordinary file", prepare=_folder),
    Case("yaml: a FIFO", _READ_BAD, "no ordinary file", prepare=_fifo),
    Case("yaml: a symlink loop", _READ_BAD, "symbolic links", prepare=_loop),
    Case("yaml: a URL", "plan --config https://host/x.yaml", "No such file"),
    Case("yaml: standard input", "plan --config -", "No such file"),
    Case("yaml: inline", "plan --config", "cannot read", more=("{model: {lr: 0.1}}",)),
    _yaml("empty", "", "holds no settings"),
    _yaml("comments alone", "# nothing\n", "holds no settings"),
    _yaml("a word", "just words", "holds no settings"),
    _yaml("a list", "- model\n", "holds no settings"),
    _yaml("null", "null", "holds no settings"),
    _yaml("two documents", "model: {lr: 0.1}\n---\nmodel: {lr: 0.2}\n", "is not YAML"),
    _yaml("open bracket", "model: [1", "is not YAML"),
    _yaml("a tab", "model:\n\tlr: 1\n", "is not YAML"),
    _yaml("bytes", bytes(range(256)), "not text"),
    _yaml("NUL", "model: {lr: 0.1}\0", "is not YAML"),
    _yaml("Latin-1", "name: café\n".encode("latin-1"), "not text"),
    _yaml("UTF-16", "model: {lr: 0.1}\n".encode("utf-16"), "not text"),
    _yaml("a pickle", b"\x80\x04\x95\x0c\x00", "not text"),
    _yaml("a key twice", "model:\n  lr: 0.1\n  lr: 0.2\n", "'lr' twice"),
    _yaml("a section twice", "model: {lr: 0.1}\ntrainer: {}\nmodel: {lr: 1}\n", "'model' twice"),
    _yaml("a cycle", "model: &m\n  lr: *m\n", "contains itself"),
    _yaml("a cycle in a list", "data: {files: &f [*f]}", "contains itself"),
    _yaml("an unknown alias", "model: {lr: *nowhere}", "is not YAML"),
    _yaml("a billion laughs", _laughs(), "more than 20000 values"),
    _yaml("a billion laughs as text", "model:\n  lr: |\n    " + _laughs().replace("\n", "\n    "),
          "model.lr"),
    _yaml("10000 brackets", "model: {lr: " + "[" * 10_000, "nested more than 32 deep"),
    _yaml("200000 brackets as text", f"model: {{lr: '{'[' * 200_000}'}}", "model.lr"),
    _yaml("deep by indentation", "".join(" " * i + "a:\n" for i in range(500)), "32 deep"),
    _yaml("two megabytes", "name: " + "x" * 2**21, "characters"),
    _yaml("5000 digits", "model: {lr: " + "1" * 5000 + "}", "digits"),
    _yaml("a date in month 99", "name: 2020-99-99", "is not YAML"),
    _yaml("a list as a key", "{[1]: 2}", "is not YAML"),
    _yaml("a number as a key", "1: 2", "1"),
    _yaml("null as a key", "model: {~: 2}", "must be a string"),
    _yaml("an unknown section", "modle: {lr: 1}", "did you mean model.lr?"),
    _yaml("an unknown key", "model: {learning_rate: 1}", "learning_rate"),
    _yaml("a misspelt key", "trainer: {max_step: 1}", "did you mean trainer.max_steps?"),
    _yaml("a key of another command", "prompt: hello", "prompt"),
    _yaml("a section that is a list", "model: [lr, 1]", "no mapping"),
    _yaml("a section that is a file", "model: other.yaml", "no mapping"),
    _yaml("another configuration", "config: other.yaml", "command line alone"),
    _yaml("a word for a number", "model: {lr: high}", "model.lr"),
    _yaml("a text for a number", "trainer: {max_steps: '10 steps'}", "max_steps"),
    _yaml("a mapping for a number", "model: {lr: {value: 1}}", "model.lr"),
    _yaml("a number for a text", "name: [1]", "name"),
    _yaml("NaN", "model: {lr: .nan}\ntrainer: {max_steps: 1}", "model.lr"),
    _yaml("infinity", "model: {weight_decay: .inf}\ntrainer: {max_steps: 1}", "weight_decay"),
    _yaml("interpolation", "model: {lr: '${oc.env:HOME}'}", "model.lr"),
    _yaml("a bad budget", "memory_budget: lots", "memory size"),
    _yaml("a negative budget", "memory_budget: -1", "above zero"),
    _yaml("a list of budgets", "memory_budget: [1GB]", "memory"),
    _yaml("a float of a budget", "memory_budget: .nan", "memory"),
    _yaml("files that are a mapping", "data: {files: {a: b}}", "data.files"),
    _yaml("a bad plan name", "fold_plan: [1]", "fold_plan"),
    Case("yaml: two files, the second bad", "fit --config {good}/tiny.yaml --config {at}/b.yaml",
         "model.level", files={"b.yaml": "model: {level: -3}"}),
]  # fmt: skip

_PATH = "trainer: {{callbacks: [{{class_path: {}}}]}}"
HOSTILE = [
    _yaml(f"tag {tag}", f"model: {{lr: !!python/{tag}}}", "is not YAML")
    for tag in (
        "object/apply:os.system ['touch hacked']", "name:os.system", "module:os",
        "object:tuner.usage.X {}", "object/new:os.popen [id]", "tuple [1]",
    )
] + [
    _yaml(f"class {path}", _PATH.format(path), "may not name")
    for path in (
        "os.system", "subprocess.Popen", "antigravity.x", "hacked.Module", "torch.hub.load",
        "lightning.pytorch.callbacks.ModelCheckpoint", "lightning.pytorch.callbacks.LambdaCallback",
        "lightning.pytorch.callbacks.early_stopping.os.system", "ModelCheckpoint",
    )
] + [
    _yaml("a callback by name alone", "trainer: {callbacks: os.system}", "may not name"),
    _yaml("a callback's argument", "trainer: {callbacks: [{class_path: EarlyStopping, init_args: "
          "{monitor: {class_path: os.system}}}]}", "monitor"),
    _yaml("a callback without arguments", "trainer: {callbacks: EarlyStopping}", "monitor"),
    _yaml("a callback with a wrong one", "trainer: {callbacks: [{class_path: EarlyStopping, "
          "init_args: {monitor: x, patience: {}}}]}", "patience"),
    _yaml("a callback that refuses", "trainer: {callbacks: [{class_path: EarlyStopping, "
          "init_args: {monitor: x, mode: sideways}}]}", "sideways"),
    _yaml("a plugin", "trainer: {plugins: [{class_path: hacked.P}]}", "may not name"),
    _yaml("a strategy", "trainer: {strategy: {class_path: hacked.S}}", "may not name"),
    _yaml("a profiler", "trainer: {profiler: {class_path: hacked.P}}", "may not name"),
    _yaml("an accelerator", "trainer: {accelerator: {class_path: hacked.A}}", "may not name"),
    _yaml("a logger", "trainer: {logger: {class_path: hacked.L}}", "logger"),
    _yaml("a class for a model", "model: {class_path: hacked.M}", "class_path"),
    _yaml("a class for data", "data: {class_path: hacked.D, init_args: {}}", "class_path"),
    _yaml("a class for the search", "tune: {class_path: hacked.T}", "may not name"),
    _yaml("classes allowed by itself", "allow_class_paths: os", "command line alone"),
    _yaml("a password", "data: {dataset: 'https://me:secret@host/x'}", "password"),
    Case("a password on the command line", "fit --data.dataset s3://me:secret@host/x", "password"),
    Case("a token", "fit --data.tokenizer hf_abcdefghijklmnopqrstuvwxyz", "token"),
    Case("a class on the command line", "fit --trainer.callbacks hacked.C", "may not name"),
    Case("a class to be explained", "fit --trainer.callbacks.help hacked.C", "may not name"),
    Case("allowed classes that are none", "fit --allow-class-paths ;rm", "no import paths"),
    Case("the layer itself allowed", "fit --allow-class-paths jsonargparse", "no import paths"),
    Case("everything allowed", "fit --allow-class-paths *", "no import paths"),
]  # fmt: skip

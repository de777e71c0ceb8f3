"""What people and files get wrong: cases as data, for test_bad_input.

Words and files may name `{at}`, the folder of the case, and `{good}`, a folder of valid things:
tiny.yaml, text.txt, plan.json, run/checkpoints/last.ckpt, tokenizer/ and pretrained/.
"""

import json
import os
import shutil
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
        has_begun: It says what it is about to do before it finds the place.
    """

    name: str
    words: str
    says: str
    code: int = 2
    more: tuple[str, ...] = ()
    files: Mapping[str, Content] = field(default_factory=dict)
    prepare: Prepare = nothing
    has_begun: bool = False


def _fit(name: str, words: str, says: str, **rest: Any) -> Case:
    return Case(name, f"fit --config {{good}}/tiny.yaml {words}", says, **rest)


def _reading(name: str, words: str, says: str, **rest: Any) -> Case:
    """Read the data as `fit` does, without an account of memory before it."""
    words = f"compare --config {{good}}/tiny.yaml --optimizers adamw {words}"
    return Case(name, words, says, **rest)


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
        ("٢٤GB", "is not a memory size", 2),
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

# ---- data


def _data(name: str, file: str, content: Content | None, says: str, words: str = "") -> Case:
    files = {} if content is None else {file: content}
    return _reading(f"data: {name}", f"--data.files {{at}}/{file} {words}", says, files=files)


def _parquet(at: Path, _good: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["words " * 200] * 50}), at / "bad.parquet")
    whole = (at / "bad.parquet").read_bytes()
    (at / "bad.parquet").write_bytes(whole[: len(whole) // 2])


def _numbers(at: Path, _good: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": [1, 2]}), at / "bad.parquet")


def _damaged(at: Path, _good: Path) -> None:
    """Overwrite the middle of a Parquet file, whose end is where readers look first."""
    _parquet(at, _good)
    import pyarrow as pa
    from pyarrow import parquet

    texts = [f"{i} and {i * i}" * 40 for i in range(200)]
    parquet.write_table(pa.table({"text": texts}), at / "bad.parquet", compression="NONE")
    content = bytearray((at / "bad.parquet").read_bytes())
    content[4:2000] = b"\xff" * 1996
    (at / "bad.parquet").write_bytes(bytes(content))


_LINE = '{"text": "words"}\n'
_CHAT = "--data.chat true --data.tokenizer {good}/pretrained --model.vocab_size 328"
DATA = [
    _data("missing", "missing.txt", None, "there is no file"),
    _data("empty", "empty.txt", "", "is empty"),
    _data("blank", "blank.txt", " \n\t\n", "only blanks"),
    _data("short", "short.txt", "x = 1\n", "short"),
    _data("binary", "binary.txt", bytes(range(256)) * 10, "not UTF-8"),
    _data("Latin-1", "latin.txt", "café " .encode("latin-1") * 1000, "byte 3"),
    _data("NUL bytes", "nul.txt", b"a\0b" * 100, "NUL bytes"),
    _data("a folder", "folder.txt/inside", "x", "x"),
    _data("another kind", "text.docx", "x", ".docx"),
    _data("no extension", "text", "x", "its extension"),
    _data("a line that is broken", "b.jsonl", _LINE + '{"text": "wo', "line 2"),
    _data("a line that is a list", "l.jsonl", _LINE * 2 + "[1]\n", "line 3"),
    _data("a line without text", "n.jsonl", '{"body": "words"}\n', "it has body"),
    _data("text that is a number", "t.jsonl", '{"text": 1}\n', "holds int"),
    _data("text that is null", "u.jsonl", '{"text": null}\n', "NoneType"),
    _data("a line of Latin-1", "i.jsonl", '{"text": "é"}'.encode("latin-1"), "line 1"),
    _data("half a surrogate", "s.jsonl", '{"text": "\\ud800 words"}\n' * 500, "surrogate"),
    _data("deep JSON", "d.jsonl", '{"text": ' + "[" * 100_000, "line 1"),
    _data("5000 digits in JSON", "5.jsonl", '{"text": ' + "1" * 5000 + "}", "line 1"),
    _data("text as Parquet", "t.parquet", "words", "not a Parquet file"),
    _reading("data: Parquet cut off", "--data.files {at}/bad.parquet", "Parquet", prepare=_parquet),
    _reading("data: damaged Parquet", "--data.files {at}/bad.parquet", "cannot read",
             prepare=_damaged),
    _reading("data: Parquet of numbers", "--data.files {at}/bad.parquet", "int64",
             prepare=_numbers),
    _reading("data: a column that is not there", "--data.files {at}/t.jsonl "
             "--data.text_column body",
         "'body'", files={"t.jsonl": _LINE}),
    _reading("data: no file", "--data.files []", "names no file"),
    _reading("data: validation alone", "--data.files null --data.validation_files a.txt",
         "needs data.files"),
    _reading("data: validation missing", "--data.validation_files {at}/no.txt", "there is no file"),
    _reading("data: validation empty", "--data.validation_files {at}/no.txt", "is empty",
         files={"no.txt": ""}),
    _reading("data: no validation rows", "--data.validation_sequences 0", "validation_sequences"),
    _reading("data: more rows than text", "--data.batch_size 100000", "batch_size"),
    _reading("data: rows longer than text", "--data.sequence_length 1000000", "short"),
    _reading("data: a vocabulary too small", "--model.vocab_size 100", "too small"),
    _reading("data: streaming nothing", "--data.files null --data.streaming true",
             "nothing to read"),
    _reading("data: files and a dataset", "--data.dataset x/y", "choose one"),
    _reading("data: micro-batches that do not divide", "--data.micro_batch_size 3", "divide"),
    _reading("data: a cache that is a file", "--data.cache_dir {at}/f", "cache", files={"f": "x"}),
    _reading("data: workers", "--data.num_workers -1", "num_workers"),
    _reading("data: chat that is text", f"--data.files {{good}}/text.txt {_CHAT}", ".jsonl"),
    _reading("data: chat without a tokenizer", "--data.chat true", "a tokenizer"),
    _reading("data: chat with a broken line", f"--data.files {{at}}/c.jsonl {_CHAT}", "line 1",
         files={"c.jsonl": "{"}),
    _reading("data: chat without an answer", f"--data.files {{at}}/c.jsonl {_CHAT}", "assistant",
         files={"c.jsonl": '{"messages": [{"role": "user", "content": "hi"}]}'}),
    _reading("data: chat with a number", f"--data.files {{at}}/c.jsonl {_CHAT}", "no conversation",
         files={"c.jsonl": '{"prompt": "hi", "response": 1}'}),
    _reading("data: chat of an unknown role", f"--data.files {{at}}/c.jsonl {_CHAT}", "line 1",
         files={"c.jsonl": '{"messages": [{"role": ["x"], "content": "hi"}]}'}),
] + [
    _reading(f"sources {name}", "--data.files null", says, more=(f"--data.sources={text}",))
    for name, text, says in [
        ("empty", "[]", "names no source"),
        ("a mapping", "{}", "data.sources"),
        ("a word", "text.txt", "data.sources"),
        ("a list of words", "[a.txt]", "data.sources"),
        ("an unknown key", '[{"file": "a.txt", "weight": 1}]', "'file'"),
        ("no weight", '[{"files": ["a.txt"]}]', "weight"),
        ("weight 0", '[{"files": ["a.txt"], "weight": 0}]', "weight"),
        ("a negative weight", '[{"files": ["a.txt"], "weight": -1}]', "weight"),
        ("weight NaN", '[{"files": ["a.txt"], "weight": .nan}]', "weight"),
        ("weight true", '[{"files": ["a.txt"], "weight": true}]', "weight"),
        ("a huge weight", '[{"files": ["a.txt"], "weight": 1' + "0" * 400 + "}]", "weight"),
        ("files of a word", '[{"files": "a.txt", "weight": 1}]', "list of paths"),
        ("files of numbers", '[{"files": [1], "weight": 1}]', "list of paths"),
        ("neither", '[{"weight": 1}]', "neither"),
        ("both", '[{"files": ["a.txt"], "dataset": "x", "weight": 1}]', "choose one"),
        ("a column of a list", '[{"files": ["a.txt"], "text_column": [1], "weight": 1}]',
         "text_column"),
        ("a dataset of a number", '[{"dataset": 1, "weight": 1}]', "dataset"),
        ("a missing file", '[{"files": ["a.txt"], "weight": 1}]', "there is no file"),
        ("a class", '[{"files": {"class_path": "hacked.C"}, "weight": 1}]', "list of paths"),
        ("a cycle", "[&a {files: [*a], weight: 1}]", "data.sources"),
    ]
]  # fmt: skip

# ---- plans


def _changed(change: Callable[[dict[str, Any]], object]) -> Prepare:
    def prepare(at: Path, good: Path) -> None:
        plan = json.loads((good / "plan.json").read_text(encoding="utf-8"))
        change(plan)
        (at / "plan.json").write_text(json.dumps(plan), encoding="utf-8")

    return prepare


def _cut(at: Path, good: Path) -> None:
    text = (good / "plan.json").read_text(encoding="utf-8")
    (at / "plan.json").write_text(text[: len(text) // 2], encoding="utf-8")


def _set(*keys: str, to: Any) -> Prepare:
    def change(plan: dict[str, Any]) -> None:
        for key in keys[:-1]:
            plan = plan[key]
        plan[keys[-1]] = to

    return _changed(change)


def _without(*keys: str) -> Prepare:
    def change(plan: dict[str, Any]) -> None:
        for key in keys[:-1]:
            plan = plan[key]
        del plan[keys[-1]]

    return _changed(change)


def _first_level(to: Any) -> Prepare:
    return _changed(lambda plan: plan["levels"].update({next(iter(plan["levels"])): to}))


def _first_scale(to: Any) -> Prepare:
    return _changed(lambda plan: plan["scales"].update({next(iter(plan["scales"])): to}))


_USE_PLAN = "--fold-plan {at}/plan.json"
_SCHEMA_1 = '{"schema": "foam-lightning/fold-plan/1", '


def _text_plan(name: str, content: Content, says: str) -> Case:
    return _fit(f"plan: {name}", _USE_PLAN, says, files={"plan.json": content})


PLANS = [
    _fit("plan: missing", _USE_PLAN, "cannot read the fold plan"),
    _fit("plan: a folder", "--fold-plan {good}", "cannot read the fold plan"),
    _fit("plan: a checkpoint", "--fold-plan {good}/run/checkpoints/last.ckpt", "fold plan"),
    _text_plan("empty", "", "not JSON"),
    _text_plan("bytes", bytes(range(256)), "cannot read"),
    _text_plan("YAML", "levels: {}\n", "not JSON"),
    _text_plan("null", "null", "schema"),
    _text_plan("a list", "[1]", "schema"),
    _text_plan("a text", '"plan"', "schema"),
    _text_plan("a number", "1" * 5000, "not JSON"),
    _text_plan("deep", "[" * 100_000, "not JSON"),
    _text_plan("deep within", _SCHEMA_1 + '"levels": ' + '{"a":' * 100_000, "not JSON"),
    _text_plan("no schema", "{}", "schema"),
    _text_plan("a schema of a list", '{"schema": []}', "schema"),
    _text_plan("schema alone", _SCHEMA_1 + '"x": 1}', "not a valid fold plan"),
    _text_plan("levels of a list", _SCHEMA_1 + '"levels": [], "scales": []}', "not a valid"),
    _text_plan("levels of a text", _SCHEMA_1 + '"levels": "a", "scales": "b"}', "not a valid"),
    _text_plan("a key twice", _SCHEMA_1 + '"lr": 1, "lr": 2}', "a key twice"),
    _text_plan("a line break in a name", _SCHEMA_1 + '"a\\nb": 1, "levels": {}, "scales": {}}',
               "not a valid"),
    _fit("plan: cut off", _USE_PLAN, "not JSON", prepare=_cut),
    *(
        _fit(f"plan: {name}", _USE_PLAN, says, prepare=prepare)
        for name, prepare, says in [
            ("another schema", _set("schema", to="foam-lightning/fold-plan/9"), "schema"),
            ("no levers", _without("levers"), "levers"),
            ("no levels", _without("levels"), "levels"),
            ("no model", _without("model"), "model"),
            ("an unknown key", _set("extra", to=1), "extra"),
            ("an unknown lever", _set("levers", "extra", to=1), "extra"),
            ("levers of a list", _set("levers", to=[]), "not a valid"),
            ("model of a list", _set("model", to=[1]), "not a valid"),
            ("model of a number", _set("model", to=1), "not a valid"),
            ("model of a text size", _set("model", "hidden_size", to="32"), "hidden_size"),
            ("scales of null", _set("scales", to=None), "not a valid"),
            ("lr 0", _set("lr", to=0), "lr must be"),
            ("lr NaN", _set("lr", to=float("nan")), "lr must be"),
            ("lr of 400 digits", _set("lr", to=10**400), "lr must be"),
            ("lr of a text", _set("lr", to="high"), "lr must be"),
            ("lr true", _set("lr", to=True), "lr must be"),
            ("a negative level", _first_level(-1), "level of"),
            ("level 63", _first_level(63), "level of"),
            ("a huge level", _first_level(10**30), "level of"),
            ("level 1.5", _first_level(1.5), "level of"),
            ("a level of a text", _first_level("2"), "level of"),
            ("a level of null", _first_level(None), "level of"),
            ("a level true", _first_level(True), "level of"),
            ("a scale of NaN", _first_scale(float("nan")), "scale of"),
            ("a scale of infinity", _first_scale(float("inf")), "scale of"),
            ("a negative scale", _first_scale(-0.25), "scale of"),
            ("a scale of a list", _first_scale([0.25]), "scale of"),
            ("micro-batch 0", _set("levers", "micro_batch_size", to=0), "micro_batch_size"),
            ("micro-batch 1.5", _set("levers", "micro_batch_size", to=1.5), "micro_batch_size"),
            ("a lever of a text", _set("levers", "chunked_loss", to="no"), "chunked_loss"),
            ("an unknown dtype", _set("levers", "state_dtype", to="int4"), "int4"),
            ("a dtype of a list", _set("levers", "state_dtype", to=["int8"]), "int8"),
            ("contradictory levers", _set("levers", "selective_checkpointing", to=True),
             "activation_checkpointing"),
            ("release and accumulation", _changed(lambda plan: plan["levers"].update(
                gradient_release=True, accumulate_grad_batches=2)), "gradient_release"),
            ("another batch", _set("levers", "micro_batch_size", to=3), "batch"),
            ("another model", _set("model", "hidden_size", to=64), "hidden_size 64"),
            ("a name that is not there", _changed(lambda plan: [plan["levels"].update(x=1),
                plan["scales"].update(x=1.0)]), "x folds in"),
            ("a twin of a list", _set("twin", to=[1]), "not a valid"),
        ]
    ),
    _fit("plan: with a rival", "--fold-plan {good}/plan.json --model.optimizer adamw",
         "goes without"),
]  # fmt: skip

# ---- checkpoints


class _Touch:
    """What a hostile pickle does when it is loaded: it runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def _hostile(at: Path, _good: Path) -> None:
    torch.save({"state_dict": _Touch(at / "hacked")}, at / "bad.ckpt")


def _hostile_run(at: Path, good: Path) -> None:
    shutil.copytree(good / "run", at / "run")
    torch.save({"state_dict": _Touch(at / "hacked")}, at / "run" / "checkpoints" / "last.ckpt")


def _saved(change: Callable[[dict[str, Any]], object]) -> Prepare:
    def prepare(at: Path, good: Path) -> None:
        path = good / "run" / "checkpoints" / "last.ckpt"
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, at / "bad.ckpt")

    return prepare


def _truncated(share: float) -> Prepare:
    def prepare(at: Path, good: Path) -> None:
        content = (good / "run" / "checkpoints" / "last.ckpt").read_bytes()
        (at / "bad.ckpt").write_bytes(content[: int(len(content) * share)])

    return prepare


def _flipped(at: Path, good: Path) -> None:
    """Damage the pickle within the zip."""
    content = bytearray((good / "run" / "checkpoints" / "last.ckpt").read_bytes())
    content[200:300] = b"\xff" * 100
    (at / "bad.ckpt").write_bytes(bytes(content))


def _other_zip(at: Path, _good: Path) -> None:
    with zipfile.ZipFile(at / "bad.ckpt", "w") as file:
        file.writestr("hello.txt", "hello")


_HPARAMS = "hyper_parameters"
_FIRST = "model.model.embed_tokens.weight"
CHECKPOINTS = [
    Case(f"checkpoint: {name}, {command}", f"{command} --ckpt_path {{at}}/bad.ckpt", says,
         files=files, prepare=prepare,
         more=("--output", "out") if command == "export"
         else ("--config", "{good}/tiny.yaml") if command == "fit" else ())
    for commands, name, says, files, prepare in [
        ("fit validate generate export", "missing", "there is no checkpoint", {}, nothing),
        ("generate", "a folder", "there is no checkpoint", {"bad.ckpt/x": ""}, nothing),
        ("export", "empty", "cannot read the checkpoint", {"bad.ckpt": ""}, nothing),
        ("export", "a text", "cannot read the checkpoint", {"bad.ckpt": "hello\n"}, nothing),
        ("export", "another zip", "cannot read the checkpoint", {}, _other_zip),
        ("export", "half of it", "cannot read the checkpoint", {}, _truncated(0.5)),
        ("fit", "all but the end", "cannot read the checkpoint", {}, _truncated(0.99)),
        ("export", "damaged", "cannot read the checkpoint", {}, _flipped),
        ("fit validate export", "a hostile pickle", "cannot read the checkpoint", {},
         _hostile),
        ("export", "a tensor", "not a checkpoint of this tool", {},
         lambda at, _: torch.save(torch.ones(3), at / "bad.ckpt")),
        ("export", "a number as a key", "not a checkpoint of this tool", {},
         lambda at, _: torch.save({1: 2}, at / "bad.ckpt")),
        ("fit", "no plan", "holds no fold plan", {}, _saved(lambda c: c.pop("fold_plan"))),
        ("export", "a plan of a number", "fold plan", {}, _saved(lambda c: c.update(fold_plan=1))),
        ("fit", "a plan of a number", "fold plan", {}, _saved(lambda c: c.update(fold_plan=1))),
        ("export", "a broken plan", "not JSON", {}, _saved(lambda c: c.update(fold_plan="{"))),
        ("export", "settings of a list", "hyper_parameters", {},
         _saved(lambda c: c.update(hyper_parameters=[1]))),
        ("fit", "settings of a list", "hyper_parameters", {},
         _saved(lambda c: c.update(hyper_parameters=[1]))),
        ("validate", "an unknown setting", "hyper_parameters", {},
         _saved(lambda c: c[_HPARAMS].update(evil=1))),
        ("export", "a setting of a text", "hyper_parameters", {},
         _saved(lambda c: c[_HPARAMS].update(hidden_size="big"))),
        ("export", "a setting out of range", "hidden_size", {},
         _saved(lambda c: c[_HPARAMS].update(hidden_size=-1))),
        ("export", "an architecture that is not there", "hyper_parameters", {},
         _saved(lambda c: c[_HPARAMS].update(architecture={"config": {"model_type": "evil"}}))),
        ("export", "another architecture", "hyper_parameters", {},
         _saved(lambda c: c[_HPARAMS].update(architecture={"config": {"model_type": "gpt2"}}))),
        ("export", "an architecture of a number", "hyper_parameters", {},
         _saved(lambda c: c[_HPARAMS].update(architecture=1))),
        ("export", "another model", "hidden_size", {},
         _saved(lambda c: c[_HPARAMS].update(hidden_size=64))),
        ("export", "a missing weight", "weights", {},
         _saved(lambda c: c["state_dict"].pop("model.lm_head.weight"))),
        ("export", "no embedding", "weights", {}, _saved(lambda c: c["state_dict"].pop(_FIRST))),
        ("export", "a weight of another shape", "weights", {},
         _saved(lambda c: c["state_dict"].update({_FIRST: torch.ones(2, 2)}))),
        ("export", "an integer weight", "weights", {},
         _saved(lambda c: c["state_dict"].update({_FIRST: torch.ones(320, 32).int()}))),
        ("export", "a weight of a number", "weights", {},
         _saved(lambda c: c["state_dict"].update({_FIRST: 1}))),
        ("export", "weights of a list", "weights", {}, _saved(lambda c: c.update(state_dict=[]))),
        ("fit", "another optimizer", "--model.optimizer muon", {},
         _saved(lambda c: c[_HPARAMS].update(optimizer="muon"))),
        ("generate", "no tokenizer beside it", "no tokenizer", {}, _saved(lambda c: None)),
    ]
    for command in commands.split()
] + [
    Case("checkpoint: a hostile run folder", "generate --ckpt_path {at}/run/checkpoints/last.ckpt",
         "cannot read the checkpoint", prepare=_hostile_run),
    Case("checkpoint: a hostile config.yaml", "generate --ckpt_path {at}/checkpoints/x.ckpt",
         "may not name", files={
             "config.yaml": _PATH.format("hacked.Module"), "checkpoints/x.ckpt": ""}),
    Case("checkpoint: a config.yaml that is none", "generate --ckpt_path {at}/checkpoints/x.ckpt",
         "is not YAML", files={"config.yaml": "[", "checkpoints/x.ckpt": ""}),
    Case("checkpoint: a symlink loop", "generate --ckpt_path {at}/bad.yaml", "checkpoint",
         prepare=_loop),
    Case("checkpoint: NUL in its name", "generate --ckpt_path", "checkpoint", more=("a\0b",)),
]  # fmt: skip

# ---- tokenizers and pretrained folders


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
    torch.save({"x": _Touch(folder.parent / "hacked")}, folder / "pytorch_model.bin")


def _code(folder: Path) -> None:
    (folder / "evil.py").write_text(
        f"open({str(folder.parent / 'hacked')!r}, 'w')\nclass Evil: ..."
    )


_AUTO = {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil",
         "AutoModelForCausalLM": "evil.Evil"}  # fmt: skip
_HUGE = struct.pack("<Q", 2**60) + b"{}"
FOLDERS = [
    _reading(f"tokenizer: {name}", f"--data.tokenizer {{at}}/folder {words}", says, prepare=prepare)
    for name, says, prepare, words in [
        ("an empty folder", "cannot load the tokenizer", lambda at, _: (at / "folder").mkdir(), ""),
        ("a file", "cannot load the tokenizer", lambda at, _: (at / "folder").touch(), ""),
        ("broken JSON", "cannot load the tokenizer",
         _copy("run/tokenizer", _written("tokenizer.json", b"{")), ""),
        ("JSON of something else", "cannot load the tokenizer",
         _copy("run/tokenizer", _written("tokenizer.json", b"[1]")), ""),
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
    _fit(f"pretrained: {name}", "--model.pretrained {at}/folder", says, prepare=prepare)
    for name, says, prepare in [
        ("missing", "no config.json", nothing),
        ("an empty folder", "no config.json", lambda at, _: (at / "folder").mkdir()),
        ("broken JSON", "cannot read", _copy("pretrained", _written("config.json", b"{"))),
        ("a list", "cannot read", _copy("pretrained", _written("config.json", b"[1]"))),
        ("deep JSON", "cannot read", _copy("pretrained", _written("config.json", b"[" * 100_000))),
        ("another architecture", "gpt2",
         _copy("pretrained", _json("config.json", model_type="gpt2"))),
        ("a type of a list", "only",
         _copy("pretrained", _json("config.json", model_type=["llama"]))),
        ("code of its own", "always refused",
         _copy("pretrained", _code, _json("config.json", auto_map=_AUTO))),
        ("a size of a text", "cannot read",
         _copy("pretrained", _json("config.json", hidden_size="big"))),
        ("a size of 0", "config.json", _copy("pretrained", _json("config.json", hidden_size=0))),
        ("a negative size", "config.json",
         _copy("pretrained", _json("config.json", num_hidden_layers=-1))),
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

# ---- places to write to

_LONG = "x" * 300
_TINY = "--config {good}/tiny.yaml "
PLACES = [
    *(
        Case(f"place: a long name, {words.replace(_TINY, '')}", words + _LONG + end, says)
        for words, end, says in [
            ("fit --config ", "", "File name too long"),
            ("fit --config {good}/tiny.yaml --fold-plan ", "", "File name too long"),
            ("fit --config {good}/tiny.yaml --ckpt_path ", "", "there is no checkpoint"),
            ("export --output {at}/out --ckpt_path ", "", "there is no checkpoint"),
            ("export --ckpt_path {good}/run/checkpoints/last.ckpt --output ", "", "too long"),
            ("compare --config {good}/tiny.yaml --data.files ", ".txt", "there is no file"),
            ("fit --config {good}/tiny.yaml --model.pretrained ", "", "no config.json"),
            ("compare --config {good}/tiny.yaml --data.tokenizer ", "", "cannot load"),
            ("compare --config {good}/tiny.yaml --data.cache_dir ", "", "too long"),
            ("fit --config {good}/tiny.yaml --runs ", "", "at most 200 bytes"),
        ]
    ),
    _fit("place: runs that is a file", "--runs {at}/f", "run folder", files={"f": "x"}),
    _fit("place: runs below a file", "--runs {at}/f/g", "run folder", files={"f": "x"}),
    _fit("place: runs in /proc", "--runs /proc/runs", "run folder"),
    _fit("place: a name that is empty", "--name=", "name"),
    _fit("place: a name that leads out", "--name ../../out", "name"),
    _fit("place: an absolute name", "--name {at}/out", "name"),
    _fit("place: a name of 300 letters", f"--name {'n' * 300}", "name"),
    _fit("place: a name with a line break", "--name", "printable", more=("a\nb",)),
    _fit("place: a name of half a character", "--name", "printable", more=("\ud800",)),
    _fit("place: a name with NUL", "--name", "name", more=("a\0b",)),
    _plan("place: a picture in no folder", "--picture {at}/no/plan.png", "cannot write the"),
    _plan("place: a picture that is a folder", "--picture {at}", "cannot write the picture"),
    Case("place: export over a folder", "export --ckpt_path {good}/run/checkpoints/last.ckpt "
         "--output {at}/out", "not an empty folder", files={"out/x": "x"}),
    Case("place: export over a file", "export --ckpt_path {good}/run/checkpoints/last.ckpt "
         "--output {at}/out", "not an empty folder", files={"out": "x"}),
    Case("place: export below a file", "export --ckpt_path {good}/run/checkpoints/last.ckpt "
         "--output {at}/f/out", "cannot write", files={"f": "x"}),
    Case("place: compare below a file", "compare --config {good}/tiny.yaml --optimizers adamw "
         "--runs {at}/f --steps 1 --seeds 1", "cannot write", files={"f": "x"}, has_begun=True),
]  # fmt: skip
_COMPARE = "compare --config {good}/tiny.yaml"
_WRITE = "generate --ckpt_path {good}/run/checkpoints/last.ckpt"
REST = [
    Case("compare: an unknown optimizer", f"{_COMPARE} --optimizers foam,sgd", "sgd"),
    Case("compare: no optimizer", f"{_COMPARE} --optimizers ,", "optimizer"),
    Case("compare: no steps", f"{_COMPARE} --steps 0", "--steps 0"),
    Case("compare: no seeds", f"{_COMPARE} --seeds 0", "--seeds 0"),
    Case("generate: no tokens", f"{_WRITE} --max_new_tokens 0", "max_new_tokens"),
    Case("generate: fewer than none", f"{_WRITE} --max_new_tokens -5", "max_new_tokens"),
    Case("generate: too cold", f"{_WRITE} --temperature -1", "temperature"),
    Case("generate: NaN degrees", f"{_WRITE} --temperature .nan", "temperature"),
    Case("generate: infinitely hot", f"{_WRITE} --temperature .inf", "temperature"),
    _fit("trainer: no batches", "--trainer.limit_train_batches 0", "limit_train_batches"),
    _fit("trainer: a negative interval", "--trainer.val_check_interval -1", "val_check_interval"),
    _fit("trainer: an interval of 0", "--trainer.val_check_interval 0", "val_check_interval"),
    _fit("trainer: no validation", "--trainer.limit_val_batches 0", "limit_val_batches"),
    _fit("trainer: log never", "--trainer.log_every_n_steps=-1", "log_every_n_steps"),
    _fit("trainer: barebones", "--trainer.barebones true", "barebones"),
    _fit("trainer: an unknown accelerator", "--trainer.accelerator abacus", "abacus"),
    _fit("trainer: an unknown profiler", "--trainer.profiler stopwatch", "profiler"),
    _fit("trainer: negative clipping", "--trainer.gradient_clip_val -1", "gradient_clip_val"),
    _fit("trainer: unknown clipping", "--trainer.gradient_clip_algorithm cube", "cube"),
    _fit("trainer: no nodes", "--trainer.num_nodes 0", "num_nodes"),
    _fit("trainer: a time that is none", "--trainer.max_time soon", "soon"),
    _fit("trainer: no epochs", "--trainer.max_epochs 0", "max_epochs"),
    _fit("trainer: a rival without its package", "--model.optimizer adamw8bit", "torchao"),
    _fit("trainer: a rival with a budget", "--model.optimizer adamw --memory-budget 1GB",
         "goes without"),
    _fit("trainer: a rival that releases", "--model.optimizer adamw --model.gradient_release true",
         "goes without"),
    _fit("trainer: state offload on a CPU", "--model.state_offload true", "needs a GPU"),
]  # fmt: skip

CASES = (
    *(*USAGE, *BUDGETS, *INFEASIBLE, *NUMBERS, *YAML, *HOSTILE, *DATA, *PLANS),
    *(*CHECKPOINTS, *FOLDERS, *PLACES, *REST),
)

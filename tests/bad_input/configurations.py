"""Configurations that are no YAML, mean nothing, or mean harm."""

import os
from pathlib import Path
from typing import Any

from tests.bad_input.case import Case, Content


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


def loop(at: Path, _good: Path) -> None:
    (at / "bad.yaml").symlink_to(at / "bad.yaml")


def _folder(at: Path, _good: Path) -> None:
    (at / "bad.yaml").mkdir()


_READ_BAD = "plan --config {at}/bad.yaml --memory-budget 1GB"
YAML = [
    Case("yaml: missing", _READ_BAD, "No such file"),
    Case("yaml: a folder", _READ_BAD, "not a regular file", prepare=_folder),
    Case("yaml: a FIFO", _READ_BAD, "not a regular file", prepare=_fifo),
    Case("yaml: a symlink loop", _READ_BAD, "symbolic links", prepare=loop),
    Case("yaml: a URL", "plan --config https://host/x.yaml", "No such file"),
    Case("yaml: standard input", "plan --config -", "No such file"),
    Case("yaml: inline", "plan --config", "cannot read", more=("{model: {lr: 0.1}}",)),
    _yaml("empty", "", "has no settings"),
    _yaml("comments alone", "# nothing\n", "has no settings"),
    _yaml("a word", "just words", "has no settings"),
    _yaml("a list", "- model\n", "has no settings"),
    _yaml("null", "null", "has no settings"),
    _yaml("two documents", "model: {lr: 0.1}\n---\nmodel: {lr: 0.2}\n", "is not YAML"),
    _yaml("open bracket", "model: [1", "is not YAML"),
    _yaml("a tab", "model:\n\tlr: 1\n", "is not YAML"),
    _yaml("bytes", bytes(range(256)), "not text"),
    _yaml("NUL", "model: {lr: 0.1}\0", "is not YAML"),
    _yaml("Latin-1", "name: café\n".encode("latin-1"), "not text"),
    _yaml("UTF-16", "model: {lr: 0.1}\n".encode("utf-16"), "not text"),
    _yaml("a pickle", b"\x80\x04\x95\x0c\x00", "not text"),
    _yaml("a key twice", "model:\n  lr: 0.1\n  lr: 0.2\n", "'lr' appears twice"),
    _yaml("a section twice", "model: {lr: 0.1}\ntrainer: {}\nmodel: {lr: 1}\n", "appears twice"),
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
    _yaml("a section that is a list", "model: [lr, 1]", "must be a mapping"),
    _yaml("a section that is a file", "model: other.yaml", "must be a mapping"),
    _yaml("another configuration", "config: other.yaml", "only the command line"),
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

NAMING = "trainer: {{callbacks: [{{class_path: {}}}]}}"
HOSTILE = [
    _yaml(f"tag {tag}", f"model: {{lr: !!python/{tag}}}", "is not YAML")
    for tag in (
        "object/apply:os.system ['touch hacked']", "name:os.system", "module:os",
        "object:tuner.config.help.X {}", "object/new:os.popen [id]", "tuple [1]",
    )
] + [
    _yaml(f"class {path}", NAMING.format(path), "may not name")
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
    _yaml("a logger", "trainer: {logger: {class_path: hacked.L}}", "may not name"),
    _yaml("a class for a model", "model: {class_path: hacked.M}", "may not name"),
    _yaml("a class for data", "data: {class_path: hacked.D, init_args: {}}", "may not name"),
    _yaml("a class for the search", "tune: {class_path: hacked.T}", "may not name"),
    _yaml("classes allowed by itself", "allow_class_paths: os", "only the command line"),
    _yaml("a password", "data: {dataset: 'https://me:secret@host/x'}", "password"),
    Case("a password on the command line", "fit --data.dataset s3://me:secret@host/x", "password"),
    Case("a token", "fit --data.tokenizer hf_abcdefghijklmnopqrstuvwxyz", "token"),
    Case("a class on the command line", "fit --trainer.callbacks hacked.C", "may not name"),
    Case("a class to be explained", "fit --trainer.callbacks.help hacked.C", "may not name"),
    Case("allowed classes that are none", "fit --allow-class-paths ;rm", "import paths"),
    Case("the layer itself allowed", "fit --allow-class-paths jsonargparse", "import paths"),
    Case("everything allowed", "fit --allow-class-paths *", "import paths"),
    Case(
        "a data module that is not allowed",
        "fit --config {good}/tiny.yaml --data.class_path my_data.MyData",
        "--allow-class-paths my_data.MyData",
    ),
    *(
        Case(
            f"a data module: {name}",
            f"fit --config {{at}}/c.yaml --allow-class-paths my_data,os {words}",
            says,
            files={"c.yaml": "model: {vocab_size: 320}\ntrainer: {max_steps: 4}"},
        )
        for name, words, says in [
            ("missing", "--data.class_path my_data.MyData", "No module named 'my_data'"),
            ("of another kind", "--data.class_path os.PathLike", "no LightningDataModule"),
            ("without a name", "--data.class_path os", "cannot be imported"),
            ("arguments alone", "--data.init_args.size 3", "data.class_path"),
            (
                "and text",
                "--data.class_path my_data.MyData --data.files x.txt",
                "data.files are both set",
            ),
        ]
    ),
    *(
        Case(
            f"a callback: {name}",
            f"plan --config {{good}}/tiny.yaml --allow-class-paths my_calls,collections {words}",
            says,
        )
        for name, words, says in [
            ("missing", "--trainer.callbacks my_calls.Mine", "working directory"),
            ("of another kind", "--trainer.callbacks collections.Counter", "subclass of Callback"),
        ]
    ),
]  # fmt: skip

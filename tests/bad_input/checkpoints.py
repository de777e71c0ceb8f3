"""Checkpoints, and the run folders that they lie in."""

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bad_input.case import Case, Prepare, nothing
from tests.bad_input.configurations import NAMING, loop


class Touch:
    """What a hostile pickle does when it is loaded: it runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def _hostile(at: Path, _good: Path) -> None:
    torch.save({"state_dict": Touch(at / "hacked")}, at / "bad.ckpt")


def _hostile_run(at: Path, good: Path) -> None:
    shutil.copytree(good / "run", at / "run")
    torch.save({"state_dict": Touch(at / "hacked")}, at / "run" / "checkpoints" / "last.ckpt")


def _saved(change: Callable[[dict[str, Any]], object]) -> Prepare:
    def prepare(at: Path, good: Path) -> None:
        path = good / "run" / "checkpoints" / "last.ckpt"
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, at / "bad.ckpt")

    return prepare


def _with_data(**state: Any) -> Prepare:
    return _saved(lambda content: content.update(TextData=state))


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
        ("fit", "another level", "--model.level 3", {},
         _saved(lambda c: c[_HPARAMS].update(level=3))),
        ("fit", "another second moment", "--model.second_moment square_mean", {},
         _saved(lambda c: c[_HPARAMS].update(second_moment="square_mean"))),
        ("fit", "no step", "no global_step", {}, _saved(lambda c: c.update(ranks=[{}]))),
        ("validate generate", "no tokenizer beside it", "no tokenizer", {},
         _saved(lambda c: None)),
        ("generate export", "a tokenizer of a list", "no tokenizer", {}, _with_data(tokenizer=[])),
        ("generate export", "a tokenizer of a text", "cannot load the tokenizer", {},
         _with_data(tokenizer={"tokenizer.json": "{}"})),
        ("generate", "a tokenizer above its folder", "not a plain name", {},
         _with_data(tokenizer={"../hacked": torch.zeros(1, dtype=torch.uint8)})),
        ("validate", "files of a number", "no tokenizer", {}, _with_data(settings={"files": 5})),
        ("validate", "a length below 1", "data.sequence_length", {},
         _with_data(settings={"sequence_length": -1})),
        ("validate", "sources of a class", "data.sources", {},
         _with_data(settings={"sources": {"class_path": "hacked.Module"}})),
        ("validate", "settings with a number", "no tokenizer", {}, _with_data(settings={1: 2})),
    ]
    for command in commands.split()
] + [
    Case("checkpoint: a step past the end",
         "fit --config {good}/tiny.yaml --ckpt_path {at}/bad.ckpt "
         "--data.tokenizer {good}/run/tokenizer", "nothing is left to train",
         prepare=_saved(lambda c: c.update(ranks=[{}], global_step=99))),
    Case("checkpoint: a hostile run folder", "generate --ckpt_path {at}/run/checkpoints/last.ckpt",
         "cannot read the checkpoint", prepare=_hostile_run),
    Case("checkpoint: a hostile config.yaml", "generate --ckpt_path {at}/checkpoints/x.ckpt",
         "may not name", files={
             "config.yaml": NAMING.format("hacked.Module"), "checkpoints/x.ckpt": ""}),
    Case("checkpoint: a config.yaml that is none", "generate --ckpt_path {at}/checkpoints/x.ckpt",
         "is not YAML", files={"config.yaml": "[", "checkpoints/x.ckpt": ""}),
    Case("checkpoint: a symlink loop", "generate --ckpt_path {at}/bad.yaml", "checkpoint",
         prepare=loop),
    Case("checkpoint: NUL in its name", "generate --ckpt_path", "checkpoint", more=("a\0b",)),
]  # fmt: skip

"""Settings: YAML and command line, read by Lightning's configuration layer into one job."""

import json
import re
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace, _loaders_dumpers
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt, register_type
from lightning.pytorch import Trainer

from foam_lightning.errors import ConfigError, FoamError, one_line
from foam_lightning.job import Job
from foam_lightning.settings import DataSettings, ModelSettings, TrainerSettings
from foam_lightning.units import ByteSize
from tuner.config.allowed_classes import allow_only, refusal
from tuner.config.help import nearest, values_of
from tuner.config.safe_yaml import checked_loader
from tuner.trials.budget import TuneOptions

# Options of single commands; all others are shared, so that one YAML serves every command.
_OWN = (
    *("ckpt_path", "format", "uniform_level", "tensors", "picture"),
    *("prompt", "max_new_tokens", "temperature", "output", "biased"),
    *("optimizers", "steps", "seeds"),
    "allow_class_paths",
)
# Values are YAML too, on the command line and as texts within a file; there is no public place to
# say how they are read.
_layer: Any = _loaders_dumpers
_layer.yaml_default_loader = checked_loader(_layer.get_yaml_default_loader())
_ALLOW = ("--allow-class-paths", "--allow_class_paths")
_LONGEST_NAME = 200  # bytes; file systems take 255, and files in the making have longer names
_MOST_CHARACTERS = 500  # of an error; a value may be long, and a type's description is


@dataclass(frozen=True)
class Settings:
    """What a command was asked to do.

    Attributes:
        values: Every setting by name; nested ones in the form of the YAML.
        text: The settings that all commands share, as YAML; equal texts are the same run.
        command: What was typed.
    """

    values: Namespace
    text: str
    command: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.values, name)

    @property
    def tune(self) -> TuneOptions:
        """How much to search."""
        return TuneOptions(**self.values.tune.as_dict())

    def job(self) -> Job:
        """Make the training job of these settings.

        Raises:
            ConfigError: The settings contradict each other.
        """
        model = ModelSettings(**self.values.model.as_dict())
        if model.optimizer != "foam" and (self.values.memory_budget or self.values.fold_plan):
            raise ConfigError(
                f"model.optimizer {model.optimizer} does not support --memory-budget or "
                "--fold-plan, which need foam; leave them out"
            )
        return Job(
            model=model,
            data=DataSettings(**self.values.data.as_dict(), vocab_size=model.vocab_size),
            trainer=TrainerSettings(self.values.trainer.as_dict()),
            seed=self.values.seed_everything,
        )


def parse(command: str, options: Sequence[str], *, default: Path | None) -> Settings:
    """Read the options of a command.

    Args:
        command: The command.
        options: The words after it.
        default: A configuration to begin with.

    Raises:
        ConfigError: An option or a key is unknown, missing, or of the wrong type.
    """
    allow_only(name for names in values_of(options, *_ALLOW) for name in names.split(","))
    parser = make_parser(command)
    try:
        beginning = ("--config", str(default)) if default else ()
        values = parser.parse_args([*beginning, *_with_lists(options)], env=False)
        shared = values.clone()
        for key in ("config", *_OWN):
            shared.pop(key, None)
        text = str(parser.dump(shared, skip_validation=True))
        typed = shlex.join(["python", "cli.py", command, *options])
        settings = Settings(parser.instantiate(values), text, typed)
    except FoamError:
        raise
    except Exception as error:  # whatever a type, or the constructor of a callback, raises
        raise ConfigError(_line(error, parser)) from error
    _ = settings.tune  # out of range, if any is
    _check_place(settings.runs, settings.name)
    return settings


def _check_place(runs: str, name: str) -> None:
    """Refuse a name that is no folder below that of all runs, and names that no disk takes."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise ConfigError(f"--name {name!r} must be a folder below --runs {runs!r}; such as my-run")
    for part in (*Path(runs).parts, *parts):
        size = len(part.encode("utf-8", "replace"))
        if size > _LONGEST_NAME or not part.isprintable():
            raise ConfigError(
                f"--runs and --name hold a name of {size} bytes, {part[:40]!r}; give folders whose "
                f"names are printable and have at most {_LONGEST_NAME} bytes"
            )


def _line(error: Exception, parser: ArgumentParser) -> str:
    """Say in one line what the configuration layer found."""
    denied = re.search(r"Importing '([^']+)' is not allowed", str(error))
    if denied is not None:
        return refusal(denied[1])
    text = one_line(error)
    flag = re.search(r"unrecognized arguments: (--[^\s=]+)", text)
    key = re.search(r"(?:Group '(\w+)' does not accept option|Option) '([^']+)'", text)
    flags = [name for action in parser._actions for name in action.option_strings]
    if flag is not None:
        text += nearest(flag[1], flags)
    elif key is not None:
        name = key[2] if key[1] is None or key[2].startswith(key[1]) else f"{key[1]}.{key[2]}"
        text += nearest(name, (name[2:] for name in flags))
    return textwrap.shorten(text, _MOST_CHARACTERS, placeholder=" ...")


def _with_lists(options: Sequence[str]) -> list[str]:
    """Turn `--data.files a.txt b.txt` into the one word that jsonargparse reads as a list."""
    words: list[str] = []
    files: list[str] | None = None
    for word in (*options, "--"):
        if word.startswith("--") and files is not None:
            words.append(files[0] if files[:1] == ["null"] else json.dumps(files))
            files = None
        if files is not None and not word.startswith("["):
            files.append(word)
            continue
        files = None
        words.append(word)
        if word in ("--data.files", "--data.validation_files"):
            files = []
    return words[:-1]


def make_parser(command: str) -> ArgumentParser:
    """Build the parser of one command.

    Args:
        command: One of fit, plan, tune, validate, generate, export, compare.
    """
    register_type(ByteSize, serializer=str, deserializer=ByteSize, fail_already_registered=False)
    parser = ArgumentParser(prog=f"cli.py {command}", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--memory_budget", "--memory-budget", type=ByteSize, default=None)
    parser.add_argument("--fold_plan", "--fold-plan", type=str | None, default=None)
    parser.add_argument("--seed_everything", type=int, default=0)
    parser.add_argument("--name", type=str, default="default")
    parser.add_argument("--runs", type=str, default="runs")
    parser.add_argument(*reversed(_ALLOW), type=str | None, default=None)
    parser.add_class_arguments(TuneOptions, "tune", instantiate=False)
    parser.add_class_arguments(ModelSettings, "model", instantiate=False)
    parser.add_class_arguments(DataSettings, "data", instantiate=False, skip={"vocab_size"})
    parser.add_class_arguments(
        Trainer,
        "trainer",
        instantiate=False,
        fail_untyped=False,
        skip={"logger", "default_root_dir"},
    )
    _add_own(parser, command)
    return parser


def _add_own(parser: ArgumentParser, command: str) -> None:
    if command == "fit":
        parser.add_argument("--ckpt_path", type=str | None, default=None)
    if command in ("validate", "generate", "export"):
        parser.add_argument("--ckpt_path", type=str, required=True)
    if command == "validate":
        parser.add_argument("--biased", type=bool, default=False)
    if command == "plan":
        parser.add_argument("--format", choices=["table", "json"], default="table")
        parser.add_argument("--uniform_level", "--uniform-level", type=int | None, default=None)
        parser.add_argument("--tensors", type=NonNegativeInt, default=0)
        parser.add_argument("--picture", type=str | None, default=None)
    if command == "generate":
        parser.add_argument("--prompt", type=str, default="")
        parser.add_argument("--max_new_tokens", type=PositiveInt, default=200)
        parser.add_argument("--temperature", type=NonNegativeFloat, default=0.8)
    if command == "compare":
        parser.add_argument("--optimizers", type=str | None, default=None)
        parser.add_argument("--steps", type=int, default=300)
        parser.add_argument("--seeds", type=int, default=2)
    if command == "export":
        parser.add_argument("--output", type=str, required=True)

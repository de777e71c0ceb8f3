"""The settings of a command, read from YAML and the command line by Lightning's jsonargparse."""

import json
import re
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace, _loaders_dumpers
from jsonargparse.typing import register_type
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from foam_lightning.data.saved import TEXT_SETTINGS, peek_checkpoint, saved_settings
from foam_lightning.errors import ConfigError, FoamError, one_line
from foam_lightning.job import Job
from foam_lightning.loggers import LoggerName
from foam_lightning.settings import (
    DataSettings,
    ModelSettings,
    TrainerSettings,
    full_precision_name,
)
from foam_lightning.units import ByteSize
from tuner.config.allowed_classes import allow_only, explain, is_allowed, refusal
from tuner.config.early_checks import DEFAULT_CONFIG, option_values, suggestion
from tuner.config.options import OPTIONS, options_of
from tuner.config.safe_yaml import checked_loader
from tuner.trials.budget import TuneOptions

# jsonargparse reads option values, and texts within a file, as YAML. Its loader for them can be
# replaced only in this private module (checked with jsonargparse 4.53, see test_security.py).
_jsonargparse: Any = _loaders_dumpers
_jsonargparse.yaml_default_loader = checked_loader(_jsonargparse.get_yaml_default_loader())
# Options that a run's config.yaml does not contain.
_UNSAVED = {one.name for one in OPTIONS if one.commands or one.is_switch} | {
    "config",
    "allow_class_paths",
}
# Settings that the config.yaml of older runs lacks, with which those of new ones must stay equal.
_LATER_SETTINGS = {
    "trainer": ("logger", "default_root_dir"),
    "data": ("class_path", "init_args"),
}
_ALLOW_FLAGS = ("--allow-class-paths", "--allow_class_paths")
_LIST_FLAGS = ("--data.files", "--data.validation_files")
# What jsonargparse says before the errors of a value that may be of several types.
_UNION = r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: (- )?"
_MAX_NAME_BYTES = 200  # file systems allow 255, and temporary files have longer names
_MAX_CHARACTERS = 500  # of an error: a value, or the description of a type, may be long


@dataclass(frozen=True)
class Settings:
    """The settings of a command; each is also an attribute.

    Attributes:
        values: The settings by name, nested as in the YAML.
        text: The settings that all commands share, as YAML.
        command: The command line.
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
        """Return the training job of these settings.

        Raises:
            ConfigError: The settings contradict each other.
        """
        model = ModelSettings(**self.values.model.as_dict())
        if model.optimizer != "foam" and (self.values.memory_budget or self.values.fold_plan):
            raise ConfigError(
                f"model.optimizer {model.optimizer} does not support --memory-budget or "
                "--fold-plan, which need foam; leave them out"
            )
        data = DataSettings(**self.values.data.as_dict(), vocab_size=model.vocab_size)
        if model.pretrained is None and data.sequence_length > model.max_position_embeddings:
            model = replace(model, max_position_embeddings=data.sequence_length)
        return Job(
            model=model,
            data=data,
            trainer=TrainerSettings(self.values.trainer.as_dict()),
            seed=self.values.seed_everything,
        )


def parse(command: str, options: Sequence[str], *, default: Path | None) -> Settings:
    """Read the options of a command.

    Args:
        command: One of `COMMANDS`.
        options: The words after it.
        default: A configuration file that the options override.

    Raises:
        ConfigError: An option or setting is unknown, missing, or has a bad value.
    """
    allowed = option_values(options, *_ALLOW_FLAGS)
    added = [name for names in allowed for name in names.split(",")]
    allow_only(added)
    parser = make_parser(command)
    try:
        first = ["--config", str(default)] if default else []
        if default == DEFAULT_CONFIG:
            first += _data_of_checkpoint(options)
        values = parser.parse_args([*first, *_join_lists(options)], env=False)
        is_of_run = default not in (None, DEFAULT_CONFIG)
        if is_of_run and not any(option_values(options, "--fold-plan", "--fold_plan")):
            values["fold_plan"] = None  # the checkpoint has the plan of its run
        _check_allowed(values.data.class_path, added)
        for flag in _LIST_FLAGS:
            if isinstance(value := values[flag[2:]], str):  # in a configuration file
                values[flag[2:]] = [value]
        values["trainer.precision"] = full_precision_name(values["trainer.precision"])
        shared = values.clone()
        for name in _UNSAVED:
            shared.pop(name, None)
        _remove_unset(shared)
        text = str(parser.dump(_with_plain_texts(shared), skip_validation=True))
        command_line = shlex.join(["python", "cli.py", command, *options])
        settings = Settings(parser.instantiate(values), text, command_line)
    except FoamError:
        raise
    except Exception as error:  # whatever a type, or the constructor of a callback, raises
        raise ConfigError(_describe(error, parser)) from error
    _ = settings.tune  # raises ConfigError if out of range
    _check_run_folder(settings.runs, settings.name)
    return settings


def _data_of_checkpoint(options: Sequence[str]) -> list[str]:
    """Return the data settings of a checkpoint outside its run folder, as options.

    A text on the command line replaces all settings of the text.
    """
    words: list[str] = []
    flags = (option.partition("=")[0] for option in options if option.startswith("--data."))
    names = {flag.removeprefix("--data.") for flag in flags}
    unused = {"tokenizer", *(TEXT_SETTINGS if names & TEXT_SETTINGS else ())}
    for path in map(Path, option_values(options, "--ckpt_path")):
        settings = saved_settings(peek_checkpoint(path) or {})
        for name in settings.keys() - unused:
            value = settings[name]
            text = value if isinstance(value, str) else json.dumps(value)
            words.append(f"--data.{name}={text}")
    return words


def _check_allowed(class_path: str | None, added: Sequence[str]) -> None:
    if class_path is not None and not is_allowed(class_path, added):
        raise ConfigError(refusal(class_path))


def _remove_unset(shared: Namespace) -> None:
    """Remove settings that older runs do not have, where they are not given."""
    for section, names in _LATER_SETTINGS.items():
        for name in names:
            if shared[section][name] is None:
                del shared[section][name]


def _with_plain_texts(value: Any) -> Any:
    """Replace texts that are members of an enum, such as the default of Timer's `interval`."""
    if isinstance(value, Namespace):
        plain = value.clone()
        for name, one in vars(value).items():
            plain[name] = _with_plain_texts(one)
        return plain
    if isinstance(value, list):
        return [_with_plain_texts(one) for one in value]
    return value.value if isinstance(value, str) and isinstance(value, Enum) else value


def _check_run_folder(runs: str, name: str) -> None:
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise ConfigError(f"--name {name!r} must be a folder below --runs {runs!r}, such as my-run")
    for part in (*Path(runs).parts, *parts):
        size = len(part.encode("utf-8", "replace"))
        if size > _MAX_NAME_BYTES or not part.isprintable():
            raise ConfigError(
                f"--runs and --name contain a folder name of {size} bytes, {part[:40]!r}; use "
                f"printable names of at most {_MAX_NAME_BYTES} bytes"
            )


def _describe(error: Exception, parser: ArgumentParser) -> str:
    """Describe an error of jsonargparse in one line."""
    denied = re.search(r"Importing '([^']+)' is not allowed", str(error))
    if denied is not None:
        return refusal(denied[1])
    text = explain(re.sub(_UNION, "", one_line(error)))
    flag = re.search(r"unrecognized arguments: (--[^\s=]+)", text)
    key = re.search(r"(?:Group '(\w+)' does not accept option|Option) '([^']+)'", text)
    flags = [name for action in parser._actions for name in action.option_strings]
    if flag is not None:
        text += suggestion(flag[1], flags)
    elif key is not None:
        name = key[2] if key[1] is None or key[2].startswith(key[1]) else f"{key[1]}.{key[2]}"
        text += suggestion(name, (name[2:] for name in flags))
    return textwrap.shorten(text, _MAX_CHARACTERS, placeholder=" ...")


def _join_lists(options: Sequence[str]) -> list[str]:
    """Turn `--data.files a.txt b.txt` into the one word that jsonargparse reads as a list."""
    words: list[str] = []
    files: list[str] | None = None
    for word in (*options, "--"):
        if word.startswith("--") and files is not None:
            words.append(_list_word(files))
            files = None
        flag, equals, value = word.partition("=")
        if flag in _LIST_FLAGS:
            words.append(flag)
            files = [value] if equals else []
        elif files is not None:
            files.append(word)
        else:
            words.append(word)
    return words[:-1]


def _list_word(files: Sequence[str]) -> str:
    if len(files) == 1 and (files[0] == "null" or re.fullmatch(r"\[.*\]", files[0], re.DOTALL)):
        return files[0]
    return json.dumps(files)


def make_parser(command: str) -> ArgumentParser:
    """Make the parser of one command.

    Args:
        command: One of `COMMANDS`.
    """
    register_type(ByteSize, serializer=str, deserializer=ByteSize, fail_already_registered=False)
    parser = ArgumentParser(prog=f"cli.py {command}", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    for option in options_of(command):
        if option.is_switch:
            parser.add_argument(option.flag, action="store_true")
        elif option.type is not None and option.name != "config":
            flags = dict.fromkeys((f"--{option.name}", option.flag))  # the first names the value
            value = {"required": True} if option.is_required else {"default": option.default}
            parser.add_argument(*flags, type=option.type, **value)
    parser.add_class_arguments(TuneOptions, "tune", instantiate=False)
    parser.add_class_arguments(ModelSettings, "model", instantiate=False)
    parser.add_class_arguments(DataSettings, "data", instantiate=False, skip={"vocab_size"})
    parser.add_class_arguments(
        Trainer,
        "trainer",
        instantiate=False,
        fail_untyped=False,
        skip={"logger"},
    )
    logger = LoggerName | Logger
    parser.add_argument("--trainer.logger", type=logger | list[logger] | bool | None)
    return parser

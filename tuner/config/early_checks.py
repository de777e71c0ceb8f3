"""Checks of the command line and its configuration files before anything slow is imported."""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml

from foam_lightning.errors import ConfigError, one_line
from foam_lightning.storage.paths import exists, is_file
from foam_lightning.units import ByteSize
from tuner.config.credentials import refuse_credentials
from tuner.config.options import COMMANDS, SECTIONS, unused_options
from tuner.config.safe_yaml import load_yaml

DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "default.yaml"


def check_command_line(command: str, options: Sequence[str]) -> None:
    """Refuse an unknown command, an option it does not use, and a bad budget or configuration.

    Args:
        command: The first word.
        options: The words after it.

    Raises:
        ConfigError: One of them is bad.
    """
    if command not in COMMANDS:
        raise ConfigError(
            f"there is no command {command!r}{suggestion(command, COMMANDS)}; use one of "
            f"{', '.join(COMMANDS)}"
        )
    for word in options:
        refuse_credentials("the command line", word)
    for option in unused_options(command):
        if any(option_values(options, option.flag, f"--{option.name}")):
            raise ConfigError(f"{command} does not use {option.flag}; remove it")
    for value in option_values(options, "--memory-budget", "--memory_budget"):
        try:
            ByteSize(value)
        except ValueError as error:
            raise ConfigError(f"--memory-budget: {error}") from error
    for value in option_values(options, "--config"):
        check_config(Path(value))
    # jsonargparse would read the value as another configuration file, without these checks.
    for value in option_values(options, *(f"--{section}" for section in SECTIONS)):
        raise ConfigError(
            f"{value!r} is given to a whole section; name one setting, such as --model.lr"
        )


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the most similar known word, or "" if none is similar."""
    similar = get_close_matches(word, list(known), n=1)
    return f"; did you mean {similar[0]}?" if similar else ""


def option_values(options: Sequence[str], *flags: str) -> Iterator[str]:
    """Yield the values of some flags, given as `--flag value` or `--flag=value`.

    Raises:
        ConfigError: The last word is one of the flags, without a value.
    """
    for position, option in enumerate(options):
        flag, equals, value = option.partition("=")
        if flag in flags:
            if not equals and position + 1 == len(options):
                raise ConfigError(f"{flag} needs a value")
            yield value if equals else options[position + 1]


def check_config(path: Path) -> None:
    """Refuse a configuration file that cannot be read, or sets what only the command line may set.

    Raises:
        ConfigError: The file is missing, is not YAML, has no settings, contains a password, names
            another configuration file, or allows itself class paths.
    """
    content = _read(path)
    if not isinstance(content, dict) or not content:
        raise ConfigError(
            f"the configuration {path} has no settings; see configs/default.yaml for an example"
        )
    refuse_credentials(f"the configuration {path}", content)
    for section in SECTIONS:
        if not isinstance(content.get(section, {}), dict):
            raise ConfigError(
                f"{section} in {path} must be a mapping of settings; see configs/default.yaml"
            )
    for key in ("config", "allow_class_paths"):
        if content.get(key) is not None:  # --print_config writes null
            raise ConfigError(
                f"{path} sets {key}, which only the command line may set; remove it from the file"
            )


def _read(path: Path) -> object:
    if exists(path) and not is_file(path):
        raise ConfigError(f"cannot read the configuration {path}: it is not a regular file")
    try:
        content: object = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from error
    except yaml.YAMLError as error:
        reason = one_line(error)
        raise ConfigError(f"the configuration {path} is not YAML: {reason}") from error
    return content


def default_config(options: Sequence[str]) -> Path | None:
    """Find the configuration of a command line without --config.

    Returns:
        The config.yaml of the run of its checkpoint, or else configs/default.yaml; None if --config
        is given.

    Raises:
        ConfigError: The config.yaml of the run is bad.
    """
    if any(option_values(options, "--config")):
        return None
    for checkpoint in option_values(options, "--ckpt_path"):
        try:
            config = Path(checkpoint).resolve().parent.parent / "config.yaml"
        except (OSError, RuntimeError, ValueError):  # a loop of symbolic links, or a NUL byte
            continue
        if is_file(config):
            check_config(config)
            return config
    return DEFAULT_CONFIG

"""What the command line answers before anything slow is imported: help, and obvious mistakes."""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml

from foam_lightning.errors import ConfigError, one_line
from foam_lightning.storage.paths import exists, is_file
from foam_lightning.units import ByteSize
from tuner.config.credentials import refuse_credentials
from tuner.config.safe_yaml import load_yaml

COMMANDS = {
    "fit": "plan, tune, rehearse, train, export",
    "plan": "say what fits a budget, without training and without a GPU",
    "tune": "fit, up to and including the rehearsal",
    "validate": "unbiased perplexity of a checkpoint",
    "generate": "text from a checkpoint",
    "export": "a Hugging Face folder from a checkpoint",
    "compare": "optimizers side by side, each at the best of its learning rates",
}

SHARED = {
    "--config FILE": "settings as YAML, repeatable; configs/default.yaml where none is given",
    "--memory-budget SIZE": "memory of one device, such as 24GB (24e9) or 24GiB (24 * 2**30)",
    "--fold-plan FILE": "train by this fold_plan.json; nothing is tuned",
    "--seed_everything N": "seed of weights, data order and search",
    "--name NAME": "the run goes to runs/NAME/version_<n>",
    "--runs DIR": "the folder of all runs",
    "--tune.fraction F": "share of the full run's steps that the search may take; .02 by default",
    "--tune.trials N": "short runs of the search, instead of a fraction",
    "--tune.steps N": "optimizer steps of a short run, instead of a fraction; under 300 misleads",
    "--trainer.max_steps N": "optimizer steps of the full run",
    "--data.files PATH": "text to train on (.txt, .jsonl, .parquet); none: Python's own library",
    "--data.dataset NAME": "a dataset on the Hugging Face Hub",
    "--data.tokenizer PATH": "a local tokenizer or one on the Hub; none trains one",
    "--model.level L": "fold level of every matrix where there is no budget",
    "--model.optimizer NAME": "foam, or a baseline of `compare`, which trains without a budget",
    "--model.max_skipped_steps N": "steps in a row skipped for bad numbers before fit stops; 10",
    "--model.max_rollbacks N": "go back to the last checkpoint, up to N times, where loss spikes",
    "--model.pretrained DIR": "start from a local Hugging Face LLaMA folder",
    "--allow-class-paths P": "let the configuration name these classes or packages (P,P), and run",
}
SECTIONS = ("model", "data", "trainer", "tune")
OWN: dict[str, dict[str, str]] = {
    "fit": {"--ckpt_path FILE": "continue from this checkpoint"},
    "plan": {
        "--format FORMAT": "table or json",
        "--uniform-level L": "account for this level everywhere instead of choosing levels",
        "--tensors N": "list the N largest tensors at the peak, by the module that made them",
        "--picture FILE": "draw the plan beside Adam, and its levels, into this PNG",
    },
    "tune": {},
    "validate": {
        "--ckpt_path FILE": "the checkpoint (required)",
        "--biased true": "also what the released FOAM code would print, beside published numbers",
    },
    "generate": {
        "--ckpt_path FILE": "the checkpoint (required)",
        "--prompt TEXT": "what the text begins with; with data.chat what the user says",
        "--max_new_tokens N": "how much to write",
        "--temperature T": "0 always takes the likeliest token",
    },
    "export": {
        "--ckpt_path FILE": "the checkpoint (required)",
        "--output DIR": "the folder to write (required)",
    },
    "compare": {
        "--optimizers NAMES": "with commas between them; all that are installed by default",
        "--steps N": "optimizer steps of each run; 300 by default, under that misleads",
        "--seeds N": "seeds on which the best learning rate of each is run; 2 by default",
    },
}


def general_help() -> str:
    """Say what commands there are."""
    rows = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
    return (
        "Train LLaMA inside the memory you have.\n\n"
        "usage: python cli.py COMMAND [options]\n\n"
        f"{rows}\n\n"
        "  python cli.py fit --memory-budget 24GB     the whole way, on text of this machine\n"
        "  python cli.py COMMAND --help               the options of a command\n"
        "  python cli.py COMMAND --print_config       every setting there is, with its value\n\n"
        "exit codes: 0 done, 2 bad usage, 3 the budget is infeasible, 4 memory ran out, 5 a disk\n"
        "or a file failed, 6 another process is at work there, 7 training diverged, 130, 143\n"
        "ended by SIGINT, SIGTERM"
    )


def command_help(command: str) -> str:
    """Say what options a command has."""
    options = {**OWN[command], **SHARED}
    rows = "\n".join(f"  {flag:<24} {text}" for flag, text in options.items())
    return (
        f"usage: python cli.py {command} [options]\n\n{COMMANDS[command]}\n\n{rows}\n\n"
        "Every setting of the configuration is an option too, in the form --model.lr 0.01;\n"
        f"`python cli.py {command} --print_config` lists them all with their values."
    )


def check_at_once(command: str, options: Sequence[str]) -> None:
    """Refuse an unknown command, a bad budget or configuration before anything slow is imported.

    Raises:
        ConfigError: One of them is bad.
    """
    if command not in COMMANDS:
        raise ConfigError(
            f"there is no command {command!r}{nearest(command, COMMANDS)}; there are "
            f"{', '.join(COMMANDS)}"
        )
    for option in options:
        refuse_credentials("the command line", option)
    for value in values_of(options, "--memory-budget", "--memory_budget"):
        try:
            ByteSize(value)
        except ValueError as error:
            raise ConfigError(f"--memory-budget: {error}") from error
    for value in values_of(options, "--config"):
        check_config(Path(value))
    # Each would be read as another configuration file, past all these checks.
    for value in values_of(options, *(f"--{section}" for section in SECTIONS)):
        raise ConfigError(f"{value!r} is given to a whole section; name a setting, as --model.lr")


def nearest(word: str, known: Iterable[str]) -> str:
    """Ask whether the word was meant as the known one that is most like it; "" if none is."""
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def values_of(options: Sequence[str], *flags: str) -> Iterator[str]:
    """Yield the values that options give to a flag, as `--flag value` or `--flag=value`."""
    for position, option in enumerate(options):
        flag, equals, value = option.partition("=")
        if flag in flags:
            if not equals and position + 1 == len(options):
                raise ConfigError(f"{flag} needs a value")
            yield value if equals else options[position + 1]


def check_config(path: Path) -> None:
    """Refuse a configuration file that cannot be read, or says what only a person may say.

    Raises:
        ConfigError: It is missing, no YAML, holds no settings, or holds a password; or it would
            read another file, or allow itself class paths.
    """
    content = _read(path)
    if not isinstance(content, dict) or not content:
        raise ConfigError(
            f"the configuration {path} holds no settings; see configs/default.yaml for their form"
        )
    refuse_credentials(f"the configuration {path}", content)
    for section in SECTIONS:
        if not isinstance(content.get(section, {}), dict):
            raise ConfigError(
                f"{section} in {path} is no mapping of settings; see configs/default.yaml"
            )
    for key in ("config", "allow_class_paths"):
        if content.get(key) is not None:  # --print_config says null
            raise ConfigError(
                f"{path} sets {key}, which stands on the command line alone; leave it out"
            )


def _read(path: Path) -> object:
    if exists(path) and not is_file(path):
        raise ConfigError(f"cannot read the configuration {path}: it is no ordinary file")
    try:
        content: object = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from error
    except yaml.YAMLError as error:
        reason = one_line(error)
        raise ConfigError(f"the configuration {path} is not YAML: {reason}") from error
    return content


def default_config(options: list[str]) -> Path | None:
    """Choose the configuration of a command that names none: its checkpoint's run, or ours."""
    if any(values_of(options, "--config")):
        return None
    for checkpoint in values_of(options, "--ckpt_path"):
        try:
            beside = Path(checkpoint).resolve().parent.parent / "config.yaml"
        except (OSError, RuntimeError, ValueError):  # a loop of links, or no path at all
            continue
        if is_file(beside):
            check_config(beside)
            return beside
    return Path(__file__).parents[2] / "configs" / "default.yaml"

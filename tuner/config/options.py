"""The commands and their options: one table, from which both the parser and the help are made."""

from dataclasses import dataclass
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from foam_lightning.units import ByteSize

COMMANDS = {
    "fit": "plan, tune, rehearse, train and export",
    "plan": "show what fits a budget, without training and without a GPU",
    "tune": "fit, up to and including the rehearsal",
    "validate": "unbiased perplexity of a checkpoint",
    "generate": "text from a checkpoint",
    "export": "a Hugging Face folder or a GGUF file from a checkpoint",
    "compare": "several optimizers side by side, each at its best learning rate",
}
# The other options are settings in one of these sections of the configuration.
SECTIONS = ("model", "data", "trainer", "tune")

_OF_A_CHECKPOINT = ("validate", "generate", "export")


@dataclass(frozen=True)
class Option:
    """An option of the command line.

    Attributes:
        flag: The flag; "-" and "_" are the same in it.
        metavar: What the help calls its value.
        help: One line on what it does.
        type: The type of its value; None for a setting in a section, which has its type there.
        default: Its value where it is not given.
        is_required: Whether it must be given.
        commands: The commands that have it; None if all do. Only an option of all commands may
            stand in a configuration file, and is stored in the config.yaml of a run.
        unused_by: The commands for which a configuration may have it, and the command line not.
        is_switch: Whether it is given without a value.
    """

    flag: str
    metavar: str
    help: str
    type: Any = None
    default: Any = None
    is_required: bool = False
    commands: tuple[str, ...] | None = None
    unused_by: tuple[str, ...] = ()
    is_switch: bool = False

    @property
    def name(self) -> str:
        """The name of its value among the settings."""
        return self.flag.removeprefix("--").replace("-", "_")


def _checkpoint(text: str, *commands: str, is_required: bool = True) -> Option:
    kind: Any = str if is_required else str | None
    return Option("--ckpt_path", "FILE", text, kind, None, is_required, commands)


OPTIONS = (
    _checkpoint("continue from this checkpoint", "fit", is_required=False),
    _checkpoint("the checkpoint (required)", *_OF_A_CHECKPOINT),
    Option("--biased", "true", "also print the perplexity as the released FOAM code computes it",
           bool, False, commands=("validate",)),
    Option("--format", "FORMAT", "table or json", Literal["table", "json"], "table",
           commands=("plan",)),
    Option("--uniform-level", "L", "show the memory of this fold level for every matrix instead",
           int | None, commands=("plan",)),
    Option("--tensors", "N", "list the N largest tensors at the peak, by the module that made them",
           NonNegativeInt, 0, commands=("plan",)),
    Option("--picture", "FILE", "draw the plan beside Adam, and its fold levels, as a PNG",
           str | None, commands=("plan",)),
    Option("--prompt", "TEXT", "beginning of the text; with data.chat, what the user says",
           str, "", commands=("generate",)),
    Option("--max_new_tokens", "N", "how many tokens to generate at most; default 200",
           PositiveInt, 200, commands=("generate",)),
    Option("--temperature", "T", "of sampling; 0 takes the most likely token; default 0.8",
           NonNegativeFloat, 0.8, commands=("generate",)),
    Option("--output", "PATH", "the folder or file to write (required)", str, None, True,
           ("export",)),
    Option("--format", "FORMAT", "huggingface, a folder, or gguf, a file for llama.cpp and Ollama",
           Literal["huggingface", "gguf"], "huggingface", commands=("export",)),
    Option("--dtype", "DTYPE", "of a gguf file: bfloat16 (default), float16 or q8_0 (8 bits)",
           Literal["bfloat16", "float16", "q8_0"] | None, commands=("export",)),
    Option("--optimizers", "NAMES", "separated by commas; default all that are installed",
           str | None, commands=("compare",)),
    Option("--steps", "N", "optimizer steps per run; default 300, fewer mislead",
           int, 300, commands=("compare",)),
    Option("--seeds", "N", "seeds to run the best learning rate of each on; default 2",
           int, 2, commands=("compare",)),
    Option("--config", "FILE", "settings as YAML, repeatable; default configs/default.yaml", str),
    Option("--memory-budget", "SIZE", "memory of one device: 24GB is 24e9 bytes, 24GiB 24 * 2**30",
           ByteSize, unused_by=("compare", *_OF_A_CHECKPOINT)),
    Option("--fold-plan", "FILE", "train by this fold_plan.json instead of tuning", str | None,
           unused_by=("tune", "compare", *_OF_A_CHECKPOINT)),
    Option("--seed_everything", "N", "seed of weights, data order and search; default 0", int, 0),
    Option("--name", "NAME", "the run is stored in runs/NAME/version_<n>; default \"default\"",
           str, "default"),
    Option("--runs", "DIR", "the folder of all runs; default runs", str, "runs"),
    Option("--allow-class-paths", "P,P", "let the configuration import and run these classes or "
           "packages", str | None),
    Option("--debug", "", "show the traceback of an error", bool, False, is_switch=True),
    Option("--tune.fraction", "F", "steps of the search, as a fraction of the full run; "
           "default 0.02", unused_by=("compare",)),
    Option("--tune.trials", "N", "number of short runs, instead of a fraction",
           unused_by=("compare",)),
    Option("--tune.steps", "N", "optimizer steps per short run; under 300 misleads",
           unused_by=("compare",)),
    Option("--trainer.max_steps", "N", "optimizer steps of the full run",
           unused_by=("compare",)),
    Option("--data.files", "PATH...", "training text: files, folders, patterns; default Python's "
           "source"),
    Option("--data.dataset", "NAME", "a dataset on the Hugging Face Hub"),
    Option("--data.tokenizer", "PATH", "a local tokenizer, or one on the Hub; default trains one"),
    Option("--model.level", "L", "fold level of every matrix, without a budget; default 2"),
    Option("--model.optimizer", "NAME", "foam, or a baseline, which trains without a budget"),
    Option("--model.max_skipped_steps", "N", "stop after N steps in a row without a finite loss; "
           "default 10"),
    Option("--model.max_rollbacks", "N", "return to the last checkpoint after a loss spike, N "
           "times at most"),
    Option("--model.pretrained", "DIR",
           "a Hugging Face folder to start from (LLaMA, Qwen, Gemma, ...)"),
)  # fmt: skip


def options_of(command: str) -> list[Option]:
    """List the options of a command, those of this command first."""
    return [one for one in OPTIONS if one.commands is None or command in one.commands]


def unused_options(command: str) -> list[Option]:
    """List the options of all commands that mean nothing to this one."""
    return [one for one in OPTIONS if command in one.unused_by]

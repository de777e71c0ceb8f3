"""The command line: `python cli.py fit --memory-budget 24GB`.

torch, lightning and transformers are imported by the commands only, so that `--help` and a mistyped
budget are answered at once.
"""

import gc
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from foam_lightning import __version__
from foam_lightning.distributed.topology import Devices, check_launched, is_first_process
from foam_lightning.errors import (
    FoamError,
    MemoryFallbackError,
    UnexpectedError,
    as_storage_error,
    one_line,
)
from foam_lightning.signals import Interrupted, handle_signals
from tuner.config.early_checks import check_command_line, default_config
from tuner.config.help import command_help, general_help
from tuner.config.options import COMMANDS
from tuner.output import survive_closed_output

# Commands that share a module; every other one is in a module of its own name.
_MODULES = {"validate": "checkpoint", "generate": "checkpoint", "export": "checkpoint"}
_RESUME = "run the same command again to resume"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after the program's name; by default those of this process.

    Returns:
        The exit code: 0 done, 1 an unexpected error, 2 bad usage, 3 the budget is infeasible or
        memory ran out with no memory options left, 4 memory ran out and the same command resumes
        with options that need less (a process of its own restarts by itself), 5 a disk or a file
        failed, 6 another process uses the run folder, 7 training diverged, 130 or 143 ended by
        SIGINT or SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not is_first_process():  # the first one prints for all
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # ASCII has no "±", nor a model's text. By lines, so that a closed pipe is seen in here.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    if arguments is None:
        survive_closed_output(words[0] if words else "")
    try:
        with handle_signals():
            _run(words)
    except Interrupted as interrupted:
        if not is_first_process():  # its launcher would report the code as a failure
            return 0
        print(f"{interrupted}; {_RESUME}", file=sys.stderr)
        return interrupted.exit_code
    except Exception as error:
        if "--debug" in words:
            traceback.print_exception(error)
        if isinstance(error, MemoryFallbackError):
            return _fall_back(error, restarts=arguments is None)
        known = error if isinstance(error, FoamError) else as_storage_error(error)
        failure = known or UnexpectedError.from_error(error)
        print("error:", one_line(failure), file=sys.stderr)
        return failure.exit_code
    return 0


def _fall_back(error: MemoryFallbackError, *, restarts: bool) -> int:
    print(error, file=sys.stderr)
    if restarts:
        from tuner.oom_fallback import restart_process

        restart_process()
    print(_RESUME, file=sys.stderr)
    return error.exit_code


def _run(words: list[str]) -> None:
    """Answer what needs no settings, else parse them and run the command."""
    if not words or words[0] in ("-h", "--help"):
        print(general_help())
        return
    if words[0] == "--version":
        print(f"foam-lightning {__version__}")
        return
    command, options = words[0], words[1:]
    if command in COMMANDS and ("-h" in options or "--help" in options):
        print(command_help(command))
        return
    check_command_line(command, options)
    default = default_config(options)
    is_first_import = "tuner.config.parser" not in sys.modules
    from foam_lightning.memory.allocator import set_expandable_segments

    set_expandable_segments()
    gc.disable()  # collecting garbage among modules, which live to the end, takes seconds
    from tuner.config.parser import parse

    if is_first_import:
        gc.freeze()  # and no later collection looks at them
    gc.enable()
    settings = parse(command, options, default=default)
    check_launched(command, Devices.from_trainer(settings.values.trainer.as_dict()))
    _silence_libraries()
    module = import_module(f"tuner.commands.{_MODULES.get(command, command)}")
    getattr(module, f"run_{command}")(settings)


def _silence_libraries() -> None:
    """Keep tips and warnings of other libraries off the terminal."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())

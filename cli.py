"""The door: `python cli.py fit --memory-budget 24GB`.

Heavy imports (torch, lightning, transformers) wait inside the commands, so that `--help` and a
mistyped budget are answered at once.
"""

import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from foam_lightning import __version__
from foam_lightning.distributed.topology import Devices, check_launched, is_first_process
from foam_lightning.errors import (
    FoamError,
    MemoryFallbackError,
    as_storage_error,
    one_line,
)
from foam_lightning.signals import Interrupted, handle_signals
from tuner.config.help import (
    COMMANDS,
    check_at_once,
    command_help,
    default_config,
    general_help,
)

if TYPE_CHECKING:
    pass


# Where a command is, if not in a module of its own name.
_MODULES = {"validate": "checkpoint", "generate": "checkpoint", "export": "checkpoint"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after the program's name; those it was started with by default.

    Returns:
        The exit code: 0 done, 2 bad usage, 3 the budget is infeasible or memory ran out with every
        memory option pulled, 4 memory ran out and the same words go on with less (a process of its
        own does so by itself), 5 a disk or a file failed, 6 another process is at work there, 7
        training diverged, 130 or 143 ended by SIGINT or SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not is_first_process():  # it speaks for all
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        with handle_signals():
            return _answer(words)
    except MemoryFallbackError as error:
        print(error, file=sys.stderr)
        if arguments is None:
            from tuner.oom_fallback import restart_process

            restart_process()
        print("type the same command again to go on", file=sys.stderr)
        return error.exit_code
    except FoamError as error:
        print("error:", one_line(error), file=sys.stderr)
        return error.exit_code
    except Interrupted as interrupted:
        if not is_first_process():  # whoever started it would take its code for a fault
            return 0
        print(f"{interrupted}; type the same command again to go on", file=sys.stderr)
        return interrupted.exit_code
    except Exception as error:
        broken = as_storage_error(error)
        if broken is None:
            raise
        print(f"error: {broken}", file=sys.stderr)
        return broken.exit_code


def _answer(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(general_help())
        return 0
    if words[0] == "--version":
        print(f"foam-lightning {__version__}")
        return 0
    command, options = words[0], words[1:]
    if command in COMMANDS and ("-h" in options or "--help" in options):
        print(command_help(command))
        return 0
    check_at_once(command, options)
    default = default_config(options)
    is_first = "tuner.config.parser" not in sys.modules
    gc.disable()  # modules live to the end: looking for garbage among them takes seconds
    from tuner.config.parser import parse

    if is_first:
        gc.freeze()  # nor is it looked for among them later
    gc.enable()
    settings = parse(command, options, default=default)
    check_launched(command, Devices.of(settings.values.trainer.as_dict()))
    _quieten()
    module = import_module(f"tuner.commands.{_MODULES.get(command, command)}")
    getattr(module, f"run_{command}")(settings)
    return 0


def _quieten() -> None:
    """Keep Lightning's tips off the terminal; what matters we say ourselves."""
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())

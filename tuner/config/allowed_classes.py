"""Which classes a configuration may name: a few of Lightning's, and what the command line adds."""

from collections.abc import Iterable

from jsonargparse import set_parsing_settings
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    Timer,
)

from foam_lightning.errors import ConfigError

# Each only watches a run or ends it, and takes numbers and texts alone: no other class, no
# function, and no path that it would write to.
CALLBACKS = (DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, Timer)


def allow_only(added: Iterable[str] = ()) -> None:
    """Let the configuration layer import `CALLBACKS` and what was added, and nothing else.

    What was added once stays allowed in this process.

    Args:
        added: Import paths of classes, or of packages with all that is in them.

    Raises:
        ConfigError: One of them is no import path, or is the configuration layer itself.
    """
    names = [f"lightning.pytorch.callbacks.{one.__name__}" for one in CALLBACKS]
    homes = [f"{one.__module__}.{one.__qualname__}" for one in CALLBACKS]
    try:
        set_parsing_settings(
            import_path_denylist=["*"],
            import_path_allowlist=[*names, *homes, *added],
            # A mapping that merely looks like a class stays a mapping.
            instantiate_subclass_spec_in_any=False,
        )
    except ValueError as error:
        raise ConfigError(
            f"--allow-class-paths {','.join(added)} names no import paths; write for example "
            "my_package.MyCallback, with commas between several"
        ) from error


def refusal(path: str) -> str:
    """Say that a configuration may not name this class, and what to do."""
    names = ", ".join(one.__name__ for one in CALLBACKS)
    return (
        f"a configuration may not name {path}, whose code would run; there are {names}; if you "
        f"trust the code, add --allow-class-paths {path}"
    )

"""Classes that a configuration may name: a few of Lightning, and those of --allow-class-paths."""

from collections.abc import Iterable

from jsonargparse import set_parsing_settings
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    Timer,
)

from foam_lightning.errors import ConfigError

# Each only observes or stops a run, and takes numbers and text: no class, no function, no path to
# write to.
CALLBACKS = (DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, Timer)


def allow_only(added: Iterable[str] = ()) -> None:
    """Let jsonargparse import `CALLBACKS` and some more classes, and nothing else.

    A class that was allowed once stays allowed in this process.

    Args:
        added: Import paths of classes, or of packages with everything in them.

    Raises:
        ConfigError: One of them is not an import path, or is jsonargparse itself.
    """
    names = [f"lightning.pytorch.callbacks.{one.__name__}" for one in CALLBACKS]
    full_names = [f"{one.__module__}.{one.__qualname__}" for one in CALLBACKS]
    added = tuple(added)
    try:
        set_parsing_settings(
            import_path_denylist=["*"],
            import_path_allowlist=[*names, *full_names, *added],
            # A mapping with the key class_path stays a mapping.
            instantiate_subclass_spec_in_any=False,
        )
    except ValueError as error:
        raise ConfigError(
            f"--allow-class-paths {','.join(added)} is not a list of import paths; write for "
            "example my_package.MyCallback, separated by commas"
        ) from error


def refusal(path: str) -> str:
    """Return the error message for a class that is not allowed."""
    names = ", ".join(one.__name__ for one in CALLBACKS)
    return (
        f"a configuration may not name {path}, whose code would run; allowed are {names}; if you "
        f"trust the code, add --allow-class-paths {path}"
    )

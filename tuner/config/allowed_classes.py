"""Classes that a configuration may name: a few of Lightning, and those of --allow-class-paths."""

from collections.abc import Iterable
from importlib import import_module

from jsonargparse import set_parsing_settings
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from foam_lightning.errors import ConfigError

# Each only observes or stops a run, and takes numbers and text: no class, no function, no path to
# write to.
CALLBACKS = (DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, Timer)
# These write into a local folder, as `runs` does; others send to a server that they name.
LOGGERS = (CSVLogger, TensorBoardLogger)
_ALLOWED = (*CALLBACKS, *LOGGERS)


def allow_only(added: Iterable[str] = ()) -> None:
    """Let jsonargparse import `CALLBACKS`, `LOGGERS` and some more classes, and nothing else.

    A class that was allowed once stays allowed in this process.

    Args:
        added: Import paths of classes, or of packages with everything in them.

    Raises:
        ConfigError: One of them is not an import path, or is jsonargparse itself.
    """
    names = [f"lightning.pytorch.callbacks.{one.__name__}" for one in CALLBACKS]
    names += [f"lightning.pytorch.loggers.{one.__name__}" for one in LOGGERS]
    full_names = [f"{one.__module__}.{one.__qualname__}" for one in _ALLOWED]
    added = tuple(added)
    # jsonargparse asks for the module that defines a class, which may be another.
    full_names += [name for path in added if (name := _defined_as(path)) is not None]
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


def _defined_as(path: str) -> str | None:
    """Import a class that the user trusts, and return the path of its definition."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except Exception:  # jsonargparse says so, if the configuration names it
        return None
    return f"{found.__module__}.{found.__qualname__}" if isinstance(found, type) else None


def refusal(path: str) -> str:
    """Return the error message for a class that is not allowed."""
    names = ", ".join(one.__name__ for one in _ALLOWED)
    return (
        f"a configuration may not name {path}, whose code would run; allowed are {names}; if you "
        f"trust the code, add --allow-class-paths {path}"
    )

"""Classes that a configuration may name: a few of Lightning, and those of --allow-class-paths."""

import re
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

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

    A class that was allowed once stays allowed in this process. Those that are added may also be in
    a file in the working directory.

    Args:
        added: Import paths of classes, or of packages with everything in them.

    Raises:
        ConfigError: One of them is not an import path, or is jsonargparse itself.
    """
    names = [f"lightning.pytorch.callbacks.{one.__name__}" for one in CALLBACKS]
    names += [f"lightning.pytorch.loggers.{one.__name__}" for one in LOGGERS]
    full_names = [f"{one.__module__}.{one.__qualname__}" for one in _ALLOWED]
    added = tuple(added)
    if added and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
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


def is_allowed(path: str, added: Iterable[str]) -> bool:
    """Return whether a class is among those of --allow-class-paths, or in a package of them."""
    return any(f"{path}.".startswith(f"{one}.") for one in added)


def refusal(path: str) -> str:
    """Return the error message for a class that is not allowed."""
    names = ", ".join(one.__name__ for one in _ALLOWED)
    return (
        f"a configuration may not name {path}, whose code would run; allowed are {names}; if you "
        f"trust the code, add --allow-class-paths {path}"
    )


_OTHER_TYPES = ("Expected a", "Not a valid subclass")  # that a value could have been of
_NAMES = (
    r"Problem with given class_path '([^']+)'",
    r"(?<=class_path=')([^']+)",
    r"(?<=Given value: )([\w.]+)$",
)


def explain(text: str) -> str:
    """Shorten what jsonargparse says of a class that it could not import or create.

    Args:
        text: In one line. Returned unchanged if it is about something else.
    """
    key = re.match(r'Parser key "(trainer\.(?:callbacks|logger))": ', text)
    reasons = text[key.end() if key else 0 :].split(" - ")
    own = [one for one in reasons if not one.startswith(_OTHER_TYPES)]
    if not own or len(own) == len(reasons):
        return text
    found = next((match for name in _NAMES if (match := re.search(name, text))), None)
    name = found[1] if found else ""
    reason = own[0].removeprefix(f"Problem with given class_path {name!r}: ")
    missing = re.fullmatch(r"No module named '([^']+)'", reason)
    if missing and f"{name}.".startswith(f"{missing[1]}."):
        reason += "; put its file into the working directory or a folder of PYTHONPATH"
    return ": ".join(one for one in (key[1] if key else "", name, reason) if one)

"""What identifies a run: the settings that change its result."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foam_lightning.storage.contents import contents
from foam_lightning.storage.paths import expand_user

Values = Mapping[str, Any]


def _nothing() -> Values:
    return {}


def _unknown(_: Path) -> Values | None:
    return None


@dataclass(frozen=True)
class RunIdentity:
    """The settings that identify a run: a command with the same ones goes on with it.

    Args:
        settings: By dotted name, those that change the result. Where one names files, its value
            is from `named_files`.
        defaults: Returns the defaults by name, for a setting that an older run does not have.
        text: The whole configuration, by which runs of older versions are identified.
        parse: Returns the settings in the config.yaml of a run of an older version; None if it
            cannot be read.
    """

    settings: Values = field(default_factory=dict)
    defaults: Callable[[], Values] = _nothing
    text: str = ""
    parse: Callable[[Path], Values | None] = _unknown

    @property
    def digest(self) -> str:
        """A digest of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def differences(self, recorded: Values, *, by_path: bool = False) -> list[str]:
        """List the settings that differ.

        Args:
            recorded: The settings of a run.
            by_path: Take files of the same path for the same, whatever they contain now.
        """
        missing = [name for name in self.settings if name not in recorded]
        known = {**(self.defaults() if missing else {}), **recorded}
        names = dict.fromkeys((*self.settings, *recorded))  # one that is missing is None
        return [
            name
            for name in names
            if not _is_same(self.settings.get(name), known.get(name), by_path=by_path)
        ]


def named_files(name: str) -> dict[str, Any]:
    """Return the value of a setting that names files: as given, its path, and its contents."""
    found = contents(name)
    path = expand_user(name)
    return {
        "given": name,
        "path": name if found is None else str(path.resolve()),
        "contents": found,
    }


def _is_same(value: Any, recorded: Any, *, by_path: bool) -> bool:
    if isinstance(value, Mapping) and isinstance(recorded, Mapping):
        if "contents" in value and "contents" in recorded:
            return _are_same_files(value, recorded, by_path=by_path)
        return value.keys() == recorded.keys() and all(
            _is_same(value[key], recorded[key], by_path=by_path) for key in value
        )
    if isinstance(value, list) and isinstance(recorded, list):
        return len(value) == len(recorded) and all(
            _is_same(*pair, by_path=by_path) for pair in zip(value, recorded, strict=True)
        )
    return bool(value == recorded)


def _are_same_files(value: Values, recorded: Values, *, by_path: bool) -> bool:
    if None in (value["contents"], recorded["contents"]):  # a name on the Hub, or files that went
        return bool(value["given"] == recorded["given"] or value["path"] == recorded["path"])
    is_there = by_path and value["path"] == recorded["path"]
    return bool(value["contents"] == recorded["contents"] or is_there)

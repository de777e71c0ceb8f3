"""The folder of one run, `runs/<name>/version_<n>/`, and whether to continue it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from foam_lightning.errors import ConfigError


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps everything it writes.

    A run is finished when its `summary.json` exists, which is written last.

    Args:
        path: The version folder.
    """

    path: Path

    @classmethod
    def open(cls, root: Path, name: str, settings: str) -> Self:
        """Continue the newest version if it is unfinished and has the same settings.

        Otherwise start the next version.

        Args:
            root: The folder of all runs.
            name: The name of this run.
            settings: The resolved configuration as text; the same text is the same run.

        Raises:
            ConfigError: The folder cannot be written.
        """
        digest = hashlib.sha256(settings.encode()).hexdigest()
        numbers = [
            int(folder.name.removeprefix("version_"))
            for folder in (root / name).glob("version_*")
            if folder.name.removeprefix("version_").isdigit()
        ]
        newest = max(numbers, default=-1)
        if newest >= 0:
            found = cls(root / name / f"version_{newest}")
            if not found.summary.exists() and found._digest() == digest:
                return found
        fresh = cls(root / name / f"version_{newest + 1}")
        try:
            fresh.path.mkdir(parents=True)
            write_json(fresh._settings, {"settings_sha256": digest})
        except OSError as error:
            raise ConfigError(
                f"cannot write the run folder {fresh.path}: {error.strerror}; choose another "
                "with --runs"
            ) from error
        return fresh

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """The fold plan that the run trains by."""
        return self.path / "fold_plan.json"

    @property
    def tuning(self) -> Path:
        """The study, its report and its plots."""
        return self.path / "tuning"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint to continue from, if it exists."""
        return self.checkpoints / "last.ckpt"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, so that a checkpoint can be used without its data."""
        return self.path / "tokenizer"

    @property
    def hf(self) -> Path:
        """The Hugging Face folder."""
        return self.path / "hf"

    @property
    def summary(self) -> Path:
        """The figures of the finished run."""
        return self.path / "summary.json"

    @property
    def _settings(self) -> Path:
        return self.path / ".settings.json"

    def _digest(self) -> str | None:
        try:
            content = json.loads(self._settings.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content.get("settings_sha256") if isinstance(content, dict) else None


def write_text(path: Path, text: str) -> None:
    """Write beside `path` and rename, so that no half file is ever seen."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside `path` and rename."""
    write_text(path, json.dumps(content, indent=2) + "\n")

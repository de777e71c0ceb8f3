"""The folder of one run, `runs/<name>/version_<n>/`, and whether to continue it."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from foam_lightning.distributed.topology import is_first_process
from foam_lightning.errors import BusyError, ConfigError
from foam_lightning.storage.atomic import atomic_path, write_json, write_text

# How long a process waits for the first one to open the folder, and how often it looks.
_PATIENCE_SECONDS = 600.0
_GLANCE_SECONDS = 0.2
# Who only looks whether a folder is free holds its lock for less than this.
_LOOK_SECONDS = 1.0


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

        Otherwise start the next version. Of several processes that train together the first starts
        it, and the others wait for it.

        Args:
            root: The folder of all runs.
            name: The name of this run.
            settings: The resolved configuration as text; the same text is the same run.

        Raises:
            ConfigError: The folder cannot be written.
        """
        found = cls.unfinished(root, name, settings)
        if not is_first_process():
            until = time.monotonic() + _PATIENCE_SECONDS
            while found is None and time.monotonic() < until:
                time.sleep(_GLANCE_SECONDS)
                found = cls.unfinished(root, name, settings)
            if found is None:
                raise ConfigError(
                    f"the first process has opened no run folder in {root / name}; look at what it "
                    "says, and let all processes see the same --runs"
                )
        while found is None:
            found = cls._start(root, name, settings) or cls.unfinished(root, name, settings)
        return found

    @classmethod
    def _start(cls, root: Path, name: str, settings: str) -> Self | None:
        """Start the next version; None if another process has just started it."""
        fresh = cls(root / name / f"version_{_newest(root / name) + 1}")
        try:
            (root / name).mkdir(parents=True, exist_ok=True)
            # It appears with its settings: the same command, started twice at once, is one run.
            with atomic_path(fresh.path, overwrite=False) as temporary:
                temporary.mkdir()
                write_json(cls(temporary)._settings, {"settings_sha256": _digest(settings)})
        except OSError as error:
            if not fresh.path.exists():
                raise ConfigError(
                    f"cannot write the run folder {fresh.path}: {error.strerror}; choose another "
                    "with --runs"
                ) from error
            return None
        return fresh

    @classmethod
    def unfinished(cls, root: Path, name: str, settings: str) -> Self | None:
        """Find the folder that `open` would continue; None if it would start another."""
        found = cls(root / name / f"version_{_newest(root / name)}")
        is_open = not found.summary.exists() and found._digest() == _digest(settings)
        return found if is_open else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process from training here, until this context or the process ends.

        Of several processes that train together the first one holds the folder for all.

        Raises:
            BusyError: Another process holds it.
            ConfigError: The file system has no locks.
        """
        if not is_first_process():
            yield
            return
        # Where there is no flock, a mere file in its place would outlive a process that was killed.
        lock = FileLock(self.path / ".training.lock", fallback_to_soft=False)
        try:
            lock.acquire(timeout=_LOOK_SECONDS, poll_interval=_GLANCE_SECONDS)
        except Timeout as error:
            raise BusyError(
                f"another process trains in {self.path}; wait for its end, or start a run of its "
                "own with --name"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"cannot lock a file in {self.path}: {error.strerror}; choose another place with "
                "--runs"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def check_not_held(self) -> None:
        """Refuse a folder in which another process trains; see `held`.

        Raises:
            BusyError: Another process trains here.
            ConfigError: The file system has no locks.
        """
        with self.held():
            pass

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """The fold plan that the run trains by."""
        return self.path / "fold_plan.json"

    @property
    def fallback(self) -> Path:
        """What the run goes on with since memory ran out; absent if it never did."""
        return self.path / "fallback.json"

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

    def others(self, name: str) -> list[Path]:
        """List the files of this name in the other versions of the run, oldest first."""
        # By the number of the version: a clock may have gone backwards.
        numbers = sorted(_numbers(self.path.parent))
        found = (self.path.parent / f"version_{number}" / name for number in numbers)
        return [path for path in found if path.exists() and self.path not in path.parents]

    def name_plan(self, settings: str) -> None:
        """Put the plan into the configuration of the run, so that it alone repeats the run.

        Args:
            settings: The resolved configuration as text.
        """
        others = [line for line in settings.splitlines() if not line.startswith("fold_plan:")]
        write_text(self.config, "\n".join([f"fold_plan: {self.plan}", *others, ""]))

    @property
    def _settings(self) -> Path:
        return self.path / ".settings.json"

    def _digest(self) -> str | None:
        try:
            content = json.loads(self._settings.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content.get("settings_sha256") if isinstance(content, dict) else None


def _newest(runs: Path) -> int:
    """Find the number of the newest version; -1 if there is none."""
    return max(_numbers(runs), default=-1)


def _numbers(runs: Path) -> list[int]:
    names = (folder.name.removeprefix("version_") for folder in runs.glob("version_*"))
    return [int(name) for name in names if name.isdigit()]


def _digest(settings: str) -> str:
    return hashlib.sha256(settings.encode()).hexdigest()

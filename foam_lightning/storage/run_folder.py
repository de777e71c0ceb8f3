"""The folder of one run, `runs/<name>/version_<n>/`, and whether to resume it."""

import json
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from filelock import Timeout

from foam_lightning.distributed.topology import is_first_process
from foam_lightning.errors import BusyError, ConfigError
from foam_lightning.storage.atomic import atomic_path, write_json, write_text
from foam_lightning.storage.locks import file_lock
from foam_lightning.storage.paths import exists
from foam_lightning.storage.run_identity import RunIdentity

# How long a rank waits until the first one has created the folder, and how often it checks.
_TIMEOUT_SECONDS = 600.0
_POLL_SECONDS = 0.2
# A process that only checks whether a folder is free holds its lock for less than this.
_LOCK_TIMEOUT_SECONDS = 1.0


@dataclass(frozen=True)
class RunFolder:
    """The paths of everything that a run writes.

    A run is finished when its `summary.json` exists, which is written last.

    Args:
        path: The version folder.
    """

    path: Path

    @classmethod
    def open(
        cls, root: Path, name: str, identity: RunIdentity, *, start: Path | None = None
    ) -> Self:
        """Go on with the newest unfinished version of the same identity.

        If there is none, create the next version. Of several ranks the first creates it, and the
        others wait.

        Args:
            root: The folder of all runs.
            name: The name of this run.
            identity: What identifies it.
            start: The checkpoint that a new version starts from; None if it starts from none.

        Raises:
            ConfigError: The folder cannot be written, or the first rank has not created it in 10
                minutes.
        """
        found = cls.find_unfinished(root, name, identity)
        if not is_first_process():
            until = time.monotonic() + _TIMEOUT_SECONDS
            while found is None and time.monotonic() < until:
                time.sleep(_POLL_SECONDS)
                found = cls.find_unfinished(root, name, identity)
            if found is None:
                raise ConfigError(
                    f"rank 0 has created no run folder in {root / name} within "
                    f"{_TIMEOUT_SECONDS:.0f} s; read its output, and give all ranks the same --runs"
                )
        while found is None:
            found = cls._start(root, name, identity, start) or cls.find_unfinished(
                root, name, identity
            )
        return found

    @classmethod
    def _start(
        cls, root: Path, name: str, identity: RunIdentity, start: Path | None
    ) -> Self | None:
        """Create the next version; None if another process has just created it."""
        fresh = cls(root / name / f"version_{max(_numbers(root / name), default=-1) + 1}")
        record = {
            "settings_sha256": identity.digest,  # for older versions of this tool
            "identity": identity.settings,
            "start": None if start is None else str(start.absolute()),
        }
        try:
            (root / name).mkdir(parents=True, exist_ok=True)
            # It appears with its settings, so that the same command started twice is one run.
            with atomic_path(fresh.path, overwrite=False) as temporary:
                temporary.mkdir()
                write_json(cls(temporary)._settings, record)
        except OSError as error:
            if not fresh.path.exists():
                raise ConfigError(
                    f"cannot write the run folder {fresh.path}: {error.strerror}; choose another "
                    "with --runs"
                ) from error
            return None
        return fresh

    @classmethod
    def find_unfinished(cls, root: Path, name: str, identity: RunIdentity) -> Self | None:
        """Find the version that `open` goes on with; None if it would create another."""
        open_runs = (run for run in cls.versions(root, name) if not run.is_finished)
        return next((run for run in open_runs if run.matches(identity)), None)

    @classmethod
    def find_finished(
        cls, root: Path, name: str, identity: RunIdentity, *, ignoring: Collection[str] = ()
    ) -> list[Self]:
        """List the finished versions of the same identity, newest first.

        Files count by what they contain: a run that ended before a text was edited is another one.

        Args:
            root: The folder of all runs.
            name: The name of the run.
            identity: What identifies it.
            ignoring: Names of settings that may differ.
        """
        finished = (run for run in cls.versions(root, name) if run.is_finished)
        return [run for run in finished if run.matches(identity, ignoring=ignoring, by_path=False)]

    @classmethod
    def versions(cls, root: Path, name: str) -> list[Self]:
        """List the versions of a run, newest first."""
        # Not by time: a clock may have been set back.
        numbers = sorted(_numbers(root / name), reverse=True)
        return [cls(root / name / f"version_{number}") for number in numbers]

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended and nothing is left of it."""
        return self.summary.exists()

    def matches(
        self,
        identity: RunIdentity,
        *,
        ignoring: Collection[str] = (),
        by_path: bool | None = None,
    ) -> bool:
        """Whether a command goes on with this version.

        Once it has a checkpoint, files of the same path count as the same, whatever they contain:
        the same command then goes on, and does not begin again because a file was touched.

        Args:
            identity: What identifies the run of the command.
            ignoring: Names of settings that may differ.
            by_path: As for `differences`.
        """
        record = self._record()
        if "identity" not in record and record.get("settings_sha256") == identity.digest:
            return True  # a run of an older version
        differences = self.differences(identity, by_path=by_path)
        return differences is not None and not set(differences) - set(ignoring)

    def differences(
        self, identity: RunIdentity, *, by_path: bool | None = None
    ) -> list[str] | None:
        """List the settings in which a command differs; None if those of the run are unknown.

        Args:
            identity: What identifies the run of the command.
            by_path: Take files of the same path for the same; by default if there is a checkpoint.
        """
        recorded = self._identity(identity)
        if recorded is None:
            return None
        is_begun = exists(self.last_checkpoint) if by_path is None else by_path
        return identity.differences(recorded, by_path=is_begun)

    def _identity(self, identity: RunIdentity) -> Mapping[str, Any] | None:
        record = self._record()
        found = record.get("identity")
        if isinstance(found, dict):
            return found
        return identity.parse(self.config) if "settings_sha256" in record else None

    @property
    def start(self) -> Path | None:
        """The checkpoint that this version started from; None if it started from none."""
        start = self._record().get("start")
        return Path(start) if isinstance(start, str) else None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training here until this context or the process ends.

        Of several ranks the first one holds the lock for all.

        Raises:
            BusyError: Another process holds the lock.
            ConfigError: The file system has no locks.
        """
        if not is_first_process():
            yield
            return
        lock = file_lock(self.path / ".training.lock")
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_SECONDS, poll_interval=_POLL_SECONDS)
        except Timeout as error:
            raise BusyError(
                f"another process trains in {self.path}; wait until it ends, or start a separate "
                "run with --name"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"cannot lock a file in {self.path}: {error.strerror}; choose a folder on another "
                "file system with --runs"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def check_unlocked(self) -> None:
        """Check that no other process trains here; see `lock`.

        Raises:
            BusyError: Another process trains here.
            ConfigError: The file system has no locks.
        """
        with self.lock():
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
        """The memory options in use since memory ran out; absent if it never did."""
        return self.path / "fallback.json"

    @property
    def tuning(self) -> Path:
        """The Optuna study, its report and its plots."""
        return self.path / "tuning"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint to resume from, if it exists."""
        return self.checkpoints / "last.ckpt"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, so that a checkpoint can be used without its training text."""
        return self.path / "tokenizer"

    @property
    def hf(self) -> Path:
        """The exported Hugging Face folder."""
        return self.path / "hf"

    @property
    def summary(self) -> Path:
        """The results; the run is finished when it exists."""
        return self.path / "summary.json"

    def other_versions(self, name: str) -> list[Path]:
        """List the files of this name in the other versions of the run, oldest version first."""
        # Not by time: a clock may have been set back.
        numbers = sorted(_numbers(self.path.parent))
        found = (self.path.parent / f"version_{number}" / name for number in numbers)
        return [path for path in found if path.exists() and self.path not in path.parents]

    def write_config(self, settings: str) -> None:
        """Write the configuration with the path of the plan, so that it alone repeats the run.

        Args:
            settings: The resolved configuration as text.
        """
        others = [line for line in settings.splitlines() if not line.startswith("fold_plan:")]
        write_text(self.config, "\n".join([f"fold_plan: {self.plan}", *others, ""]))

    @property
    def _settings(self) -> Path:
        return self.path / ".settings.json"

    def _record(self) -> Mapping[str, Any]:
        try:
            content = json.loads(self._settings.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def _numbers(runs: Path) -> list[int]:
    names = (folder.name.removeprefix("version_") for folder in runs.glob("version_*"))
    return [int(name) for name in names if name.isdigit()]

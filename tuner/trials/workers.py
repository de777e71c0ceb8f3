"""The processes that search in one folder: which of them live, whose turn it is, and who leads."""

import os
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from filelock import FileLock, Timeout

from foam_lightning.errors import ConfigError
from foam_lightning.storage.atomic import write_text

Task = Literal["tune", "fit"]
_TASKS = ("tune", "fit")  # the later one does what the earlier one does, and more
_GLANCE_SECONDS = 0.5


class Worker:
    """This process, as one of those that search in a folder; a context manager.

    It lives as long as it holds the lock of a file of its own, which the system lets go of however
    the process ends, `kill -9` included, and in no other case: no signs of life are needed that a
    stopped or busy process would fail to give. One of the living leads: it alone goes on when the
    search is over.

    Locks are those of `flock`. They are sure on one machine; on a folder that several machines
    share, the file system decides.

    Args:
        folder: What the workers share; gets the folder `workers`.
        task: What the process was asked for.
        say: Called with lines for a person to read.

    Attributes:
        name: Tells it from all other workers, earlier ones too; begins with its task and the
            number of its process.

    Raises:
        ConfigError: The file system has no locks.
    """

    def __init__(
        self, folder: Path, task: Task, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.name = f"{task}-{os.getpid()}-{secrets.token_hex(2)}"
        self._folder = folder / "workers"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._say = say
        self._said: str | None = None
        self._life = _lock(self._file(self.name))
        self._turn = _lock(self._folder / "turn.lock")

    def __enter__(self) -> Self:
        """Begin to live, and lead if nobody does."""
        try:
            self._life.acquire()
        except OSError as error:  # as a file system without locks says
            raise ConfigError(
                f"cannot lock a file in {self._folder}: {error.strerror}; choose another place "
                "with --runs"
            ) from error
        with self.turn():
            leader = self._find_leader()
        if leader != self.name:
            self._say(f"joined {leader}: every run of the search is done once, by one of us")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave: what it had begun is free to be taken up."""
        self._file(self.name).unlink(missing_ok=True)
        self._life.release()

    def turn(self) -> AbstractContextManager[object]:
        """Wait for the turn of this worker; while it has it, no other one has."""
        return self._turn

    def is_alive(self, name: str) -> bool:
        """Tell whether a worker lives. To be asked in one's turn.

        Args:
            name: Of any worker, this one too.
        """
        path = self._file(name)
        if not path.exists():
            return False
        try:
            with _lock(path).acquire(blocking=False):
                path.unlink(missing_ok=True)
        except Timeout:
            return True
        return False

    def leads(self) -> bool:
        """Find out whether this one goes on alone; if not, there is nothing left for it to do.

        The lead goes to the first that asks while no leader lives. One that trains waits until
        another, which only tunes, has done so.
        """
        while True:
            with self.turn():
                leader = self._find_leader()
            if leader == self.name:
                return True
            if _rank(leader) >= _rank(self.name):
                self._say(f"{leader} goes on from here; nothing is left to do for this process")
                return False
            self.wait_for([leader], "the plan")

    def wait_for(self, others: Iterable[str], what: str) -> None:
        """Let a moment pass, and say once what is waited for.

        Args:
            others: Who is at work.
            what: At what.
        """
        if what != self._said:
            self._say(f"waiting for {', '.join(sorted(others))} to end {what}")
            self._said = what
        time.sleep(_GLANCE_SECONDS)

    def _find_leader(self) -> str:
        """Name the living leader, which is this worker if there is none."""
        path = self._folder / "leader"
        leader = path.read_text(encoding="utf-8") if path.exists() else None
        if leader is not None and self.is_alive(leader):
            return leader
        write_text(path, self.name)
        return self.name

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.lock"


def _lock(path: Path) -> FileLock:
    # Where there is no flock, a mere file in its place would outlive a process that was killed.
    return FileLock(path, fallback_to_soft=False)


def _rank(name: str) -> int:
    return _TASKS.index(name.partition("-")[0])

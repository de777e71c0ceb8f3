"""The processes that share one search: which are alive, whose turn it is, and which one leads."""

import os
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, Self

from filelock import Timeout

from foam_lightning.errors import ConfigError
from foam_lightning.storage.atomic import write_text
from foam_lightning.storage.locks import file_lock

Task = Literal["tune", "fit"]
_TASKS = ("tune", "fit")  # `fit` does all that `tune` does, and more
_POLL_SECONDS = 0.5


class Worker:
    """This process as one of those that share a search; a context manager.

    A worker is alive as long as it holds the lock of a file of its own. The operating system
    releases the lock however the process ends, `kill -9` included, and never earlier, so that no
    heartbeat is needed, which a stopped or busy process could miss. One living worker is the
    leader: it alone continues after the search.

    The locks are those of `flock`. They are reliable on one machine; on a network file system it
    depends on the file system.

    Args:
        folder: Shared by the workers; gets the folder `workers`.
        task: The command of this process.
        say: Called with messages for the user.

    Attributes:
        name: Unique, also among earlier workers; the task, the process number and a random part.

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
        self._last_wait: str | None = None
        self._own_lock = file_lock(self._lock_file(self.name))
        self._turn_lock = file_lock(self._folder / "turn.lock")

    def __enter__(self) -> Self:
        """Join the workers, and lead if no other worker is alive."""
        try:
            self._own_lock.acquire()
        except OSError as error:  # what a file system without locks raises
            raise ConfigError(
                f"cannot lock a file in {self._folder}: {error.strerror}; choose another place "
                "with --runs"
            ) from error
        with self.turn():
            leader = self._find_leader()
        if leader != self.name:
            self._say(f"joined {leader}: each trial of the search runs in one of the processes")
        return self

    def __exit__(self, *_: object) -> None:
        """Leave; another worker may repeat the trial that this one had started."""
        self._lock_file(self.name).unlink(missing_ok=True)
        self._own_lock.release()

    def turn(self) -> AbstractContextManager[object]:
        """Return a context that one worker at a time can enter; the others wait."""
        return self._turn_lock

    def is_alive(self, name: str) -> bool:
        """Whether a worker is alive. Call it inside `turn`.

        Args:
            name: The name of any worker.
        """
        path = self._lock_file(name)
        if not path.exists():
            return False
        try:
            with file_lock(path).acquire(blocking=False):
                path.unlink(missing_ok=True)
        except Timeout:
            return True
        return False

    def claim_lead(self) -> bool:
        """Whether this worker continues after the search; if not, it has nothing left to do.

        The first worker that asks while no leader is alive becomes the leader. A worker of `fit`
        waits for a leader of `tune`, which does not train.
        """
        while True:
            with self.turn():
                leader = self._find_leader()
            if leader == self.name:
                return True
            if _rank(leader) >= _rank(self.name):
                self._say(f"{leader} continues with the plan; this process is done")
                return False
            self.wait_for([leader], "its plan")

    def wait_for(self, others: Iterable[str], what: str) -> None:
        """Sleep for a moment, and say once what for.

        Args:
            others: The workers to wait for.
            what: What they have to finish.
        """
        if what != self._last_wait:
            self._say(f"waiting for {', '.join(sorted(others))} to finish {what}")
            self._last_wait = what
        time.sleep(_POLL_SECONDS)

    def _find_leader(self) -> str:
        """Return the name of the living leader; this worker becomes it if there is none."""
        path = self._folder / "leader"
        leader = path.read_text(encoding="utf-8") if path.exists() else None
        if leader is not None and self.is_alive(leader):
            return leader
        write_text(path, self.name)
        return self.name

    def _lock_file(self, name: str) -> Path:
        return self._folder / f"{name}.lock"


def _rank(name: str) -> int:
    return _TASKS.index(name.partition("-")[0])

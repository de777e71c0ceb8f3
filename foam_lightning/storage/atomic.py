"""Atomic writes: a file or folder appears under its name only when it is complete."""

import errno
import glob
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout

from foam_lightning.distributed.topology import is_first_process
from foam_lightning.errors import BusyError, CheckpointError, first_line, is_disk_error
from foam_lightning.storage.locks import file_lock


@contextmanager
def atomic_path(
    path: Path, *, backup: Path | None = None, overwrite: bool = True, exclusive: bool = False
) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to `path` when the block ends.

    The block creates a file or a folder there. If it fails, or a signal ends it, `path` stays as it
    was and the temporary is removed. Temporaries of killed processes are removed first.

    Args:
        path: What to write.
        backup: Gets what `path` was before. At least one of the two exists at every moment.
        overwrite: Replace a folder that exists.
        exclusive: No other process writes `path`, because the caller holds a lock. Temporaries of
            other machines are removed, too.

    Raises:
        OSError: It cannot be written; `filename` is `path`.
    """
    _remove_leftovers(path, exclusive=exclusive)
    owner = f"{platform.node()}.{os.getpid()}"
    temporary = path.with_name(f"{path.name}.{owner}.{secrets.token_hex(4)}.part")
    old = Path(f"{temporary}.old")
    try:
        yield temporary
        _sync(*temporary.rglob("*"), temporary)
        if backup is not None and path.exists():
            _link(path, backup)
        if overwrite and temporary.is_dir() and path.is_dir():  # only an empty one can be replaced
            path.replace(old)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        if old.exists() and not path.exists():  # a signal came between the two renames
            old.replace(path)
        _remove(*path.parent.glob(f"{glob.escape(temporary.name)}*"))


def write_text(path: Path, text: str) -> None:
    """Write a text file; of several ranks the first alone writes."""
    if is_first_process():
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; of several ranks the first alone writes."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_folder(folder: Path, *parts: Callable[[Path], object]) -> None:
    """Write a folder; of several ranks the first alone writes.

    Args:
        folder: Replaced if it exists; its parents are created.
        parts: Called one after the other with the folder to write to.

    Raises:
        BusyError: Another process is writing it.
        CheckpointError: The folder cannot be written.
        OSError: The disk is full, or fails otherwise.
    """
    if not is_first_process():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder), atomic_path(folder, exclusive=True) as temporary:
            temporary.mkdir()
            for write_part in parts:
                write_part(temporary)
            # safetensors makes its files readable by their owner alone, whatever the umask says.
            mode = temporary.stat().st_mode & 0o666
            for file in temporary.iterdir():
                file.chmod(mode)
    except Exception as error:
        failure = _as_os_error(error)
        if failure is None:
            raise
        if is_disk_error(failure):
            raise OSError(failure.errno, failure.strerror, str(folder)) from error
        raise CheckpointError(f"cannot write {folder}: {first_line(error)}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing a folder; raise BusyError if one does."""
    path = folder.with_name(f".{folder.name}.lock")
    lock = file_lock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise BusyError(
            f"another process is writing {folder}; wait until it ends, or choose another folder"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # filelock notices a file that is unlinked under its lock
        lock.release()


def _as_os_error(error: Exception) -> OSError | None:
    """Convert a failure to write a file; None if the error is of another kind."""
    if isinstance(error, OSError):
        return error
    if type(error).__name__ == "SafetensorError":  # it has the number in its text alone
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        return OSError(number, os.strerror(number))
    return None


def _remove_leftovers(path: Path, *, exclusive: bool) -> None:
    """Remove what killed processes left while they wrote `path`."""
    # `NAME.HOST.PROCESS.TOKEN.part`, its sqlite journal, or the folder that it was to replace.
    # Earlier versions wrote `NAME.part`.
    name = rf"{re.escape(path.name)}\.(?:(.+)\.(\d+)\.[0-9a-f]{{8}}\.)?part(-journal|\.old)?"
    for left in path.parent.glob(f"{glob.escape(path.name)}.*"):
        if writer := re.fullmatch(name, left.name):
            is_dead = writer[1] == platform.node() and not _is_alive(int(writer[2]))
            if exclusive or is_dead:
                _remove(left)


def _is_alive(process: int) -> bool:
    """Return whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's, or no number of a process
        pass
    return True


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _link(path: Path, backup: Path) -> None:
    backup.unlink(missing_ok=True)
    try:
        backup.hardlink_to(path)
    except OSError:  # a file system without hard links
        path.replace(backup)


def _sync(*paths: Path) -> None:
    """Flush files, or the names in folders, to disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system has no fsync
                raise
        finally:
            os.close(descriptor)

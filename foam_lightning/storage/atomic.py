"""Atomic writes: a file or folder appears under its name only when it is complete."""

import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from foam_lightning.distributed.topology import is_first_process
from foam_lightning.errors import BusyError, CheckpointError, first_line, is_disk_error

_LOCK = ".lock"


def write_text(path: Path, text: str) -> None:
    """Write beside `path` and rename, so that no half file is ever seen.

    Of several processes that train together the first alone writes.
    """
    if not is_first_process():
        return
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        number = left.suffixes[-2].removeprefix(".")
        if number.isdigit() and not is_alive(int(number)):  # it was killed while it wrote
            left.unlink(missing_ok=True)
    # Workers on one search may write the same file at once.
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # as a full disk says it
            error.filename = str(path)
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def is_alive(process: int) -> bool:
    """Tell whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # it is another user's, or no number of a process
        return True
    return True


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside `path` and rename."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_folder(folder: Path, *parts: Callable[[Path], object]) -> None:
    """Write a folder beside `folder` and rename it, so that no half one is ever seen.

    What a process that was killed has left there is removed. Of several processes that train
    together the first alone writes.

    Args:
        folder: Replaced if it exists.
        parts: Called with the folder to write to, one after the other.

    Raises:
        BusyError: Another process is writing it.
        CheckpointError: The folder cannot be written.
        OSError: The disk is full, or fails otherwise.
    """
    if not is_first_process():
        return
    try:
        with _beside(folder) as beside:
            for write_part in parts:
                write_part(beside)
            # safetensors makes files for their owner alone; the folder has what the umask leaves.
            mode = beside.stat().st_mode & 0o666
            for file in beside.iterdir():
                file.chmod(mode)
            _sync(beside)
            shutil.rmtree(folder, ignore_errors=True)
            beside.replace(folder)
            (folder / _LOCK).unlink()
    except Exception as error:
        failure = _failure(error)
        if failure is None:
            raise
        if is_disk_error(failure):
            raise OSError(failure.errno, failure.strerror, str(folder)) from error
        raise CheckpointError(f"cannot write {folder}: {first_line(error)}") from error


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Give an empty folder that no other process has, and remove it if the writing fails."""
    beside = folder.with_name(folder.name + ".part")
    beside.mkdir(parents=True, exist_ok=True)
    lock = FileLock(beside / _LOCK, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise BusyError(
            f"another process is writing {folder}; wait for its end, or choose another"
        ) from error
    try:
        for left in beside.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != _LOCK:
                left.unlink()
        yield beside
    except BaseException:  # a signal, too
        shutil.rmtree(beside, ignore_errors=True)
        raise
    finally:
        lock.release()


def _failure(error: Exception) -> OSError | None:
    """Take the failure of a file as what it is; safetensors gives its number as text."""
    if isinstance(error, OSError):
        return error
    if type(error).__name__ == "SafetensorError":
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        return OSError(number, os.strerror(number))
    return None


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                with suppress(OSError):  # some file systems cannot
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

"""What files contain, in a few characters, to notice that an input has changed."""

import hashlib
import os
from functools import cache
from glob import glob
from pathlib import Path

from foam_lightning.storage.paths import exists, expand_user, is_folder

_SMALL_BYTES = 2**26  # read whole
_BLOCK_BYTES = 2**16
_NUM_BLOCKS = 16


def contents(name: str) -> str | None:
    """Hash what a file, all files of a folder, or those that a pattern matches, contain.

    Copies have the same hash, wherever they are and whenever they were written. Of a file above
    64 MiB the hash covers the size and 16 blocks of 64 KiB, first and last included: shards of
    terabytes take seconds, and an edit of a few bytes elsewhere is not noticed.

    Args:
        name: A path or a pattern.

    Returns:
        The hash; None if there is no such file.
    """
    path = expand_user(name)
    if not exists(path):
        found = sorted(glob(str(path), recursive=True)) if "\0" not in name else []  # noqa: PTH207
        return _digest([contents(one) or "" for one in found]) if found else None
    if not is_folder(path):
        return _file_contents(path)
    files = sorted(one for one in path.rglob("*") if one.is_file())
    names = [one.relative_to(path).as_posix() for one in files]
    return _digest([*names, *(_file_contents(one) or "" for one in files)])


def _file_contents(path: Path) -> str | None:
    try:
        stat = path.stat()
        return _hash_file(str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    except OSError:
        return None


@cache  # in this process; a command asks several times
def _hash_file(path: str, size: int, _: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with Path(path).open("rb") as file:
        if size <= _SMALL_BYTES:
            digest.update(file.read())
        else:
            last = size - _BLOCK_BYTES
            for number in range(_NUM_BLOCKS):
                file.seek(last * number // (_NUM_BLOCKS - 1), os.SEEK_SET)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]

"""Prepared data on disk: cached files, each complete or absent."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from foam_lightning.errors import DataError, first_line
from foam_lightning.storage.atomic import atomic_path
from foam_lightning.storage.paths import cache_home, expand_user
from foam_lightning.units import format_bytes

if TYPE_CHECKING:
    import pyarrow as pa

    from foam_lightning.data.table import Table

_QUIET_SECONDS = 10


def cache_folder(cache_dir: str | None) -> Path:
    """Create and return the folder of prepared data.

    Args:
        cache_dir: Where to put it; None means foam-lightning below $XDG_CACHE_HOME or ~/.cache.

    Raises:
        DataError: The folder cannot be created.
    """
    folder = cache_home() if cache_dir is None else expand_user(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot create the cache folder {folder} ({error.strerror}); "
            "choose another with data.cache_dir"
        ) from error
    return folder


def cache_key(*parts: object) -> str:
    """Hash everything that prepared data depends on, as JSON values, into a file name."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@contextmanager
def atomic_cache_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path`, a file of the cache, on success.

    Raises:
        DataError: It cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            yield temporary
    except OSError as error:
        raise DataError(
            f"cannot write {path} ({error.strerror or error}); choose another data.cache_dir"
        ) from error


def cached_table(
    path: Path,
    schema: "pa.Schema",
    batches: Callable[[], Iterable[tuple["pa.RecordBatch", int]]],
    *,
    content: str,
    num_documents: int | None = None,
) -> "Table":
    """Open an Arrow file as a memory-mapped table, writing it first if it is not there.

    Batches go to disk one by one, so the content may be larger than memory. Writing that takes
    long shows a bar with the size so far, and ends with a line about the size and the path.

    Args:
        path: The file; its name contains a `cache_key`, so an existing file is never out of date.
        schema: The columns.
        batches: Called only if the file is missing; yields each batch with its number of
            documents.
        content: One word for the content, for the bar.
        num_documents: The total for the bar; None if unknown.

    Raises:
        DataError: The file cannot be written, or the existing one is damaged.
    """
    import pyarrow as pa

    from foam_lightning.data.table import Table

    if not path.exists():
        with (
            atomic_cache_path(path) as temporary,
            _Progress(content, num_documents, path) as progress,
            pa.OSFile(str(temporary), "wb") as file,
            pa.ipc.new_stream(file, schema) as writer,
        ):
            for batch, count in batches():
                writer.write_batch(batch)
                progress.add(count, file.tell())
    try:
        return Table([path])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> DataError:
    """Return the error of a prepared file that cannot be read, as after a crash of the machine."""
    return DataError(
        f"the prepared file {path} is damaged ({first_line(error)}); delete it, and the same "
        "command makes it again"
    )


class _Progress:
    """A progress bar on stderr for writing that takes long, and a line at its end."""

    def __init__(self, content: str, num_documents: int | None, path: Path) -> None:
        from tqdm import tqdm

        self._content = content
        self._path = path
        self._size = 0
        self._began = time.monotonic()
        self._bar = tqdm(
            total=num_documents,
            desc=f"Writing {content}",
            unit="doc",
            delay=_QUIET_SECONDS,
            leave=False,
            disable=None,  # in a log file
        )

    def __enter__(self) -> Self:
        return self

    def add(self, num_documents: int, size: int) -> None:
        self._size = size
        self._bar.set_postfix_str(format_bytes(size), refresh=False)
        self._bar.update(num_documents)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if kind is None and time.monotonic() - self._began >= _QUIET_SECONDS:
            line = f"wrote {format_bytes(self._size)} of {self._content} to {self._path}"
            self._bar.write(line, file=sys.stderr)

"""Prepared data on disk: written beside and renamed, so that a reader never sees half a file."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from foam_lightning.cache_home import cache_home
from foam_lightning.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


def cache_folder(cache_dir: str | None) -> Path:
    """Create and return the folder of prepared data.

    Args:
        cache_dir: Where to put it; None means foam-lightning below $XDG_CACHE_HOME or ~/.cache.

    Raises:
        DataError: The folder cannot be created.
    """
    folder = cache_home() if cache_dir is None else Path(cache_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot create the cache folder {folder} ({error.strerror}); "
            "choose another with data.cache_dir"
        ) from error
    return folder


def cache_key(*parts: object) -> str:
    """Name the result of a preparation by everything it depends on, as JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give a temporary path that becomes `path` on success and vanishes on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"cannot write {path} ({error.strerror or error}); choose another data.cache_dir"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def cached_dataset(
    path: Path, schema: "pa.Schema", batches: Callable[[], Iterable["pa.RecordBatch"]]
) -> "Dataset":
    """Open an Arrow file as a memory-mapped dataset, writing it first if it is not there.

    Args:
        path: The file; its name holds a `cache_key`, so what is there is never out of date.
        schema: The columns.
        batches: Called to produce the content, only if the file is missing.
    """
    import pyarrow as pa
    from datasets import Dataset

    if not path.exists():
        with (
            written_beside(path) as temporary,
            pa.OSFile(str(temporary), "wb") as file,
            pa.ipc.new_stream(file, schema) as writer,
        ):
            for batch in batches():
                writer.write_batch(batch)
    return Dataset.from_file(str(path))

"""Local text files as documents, with errors that name the file and the line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from foam_lightning.data.cache import cache_key, cached_dataset
from foam_lightning.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_CHUNK_CHARACTERS = 2**23  # held in memory before a write


def files_fingerprint(files: list[str], text_column: str) -> str:
    """Name the content of some files by path, size and time of change, without reading them.

    Args:
        files: Paths of .txt, .jsonl or .parquet files.
        text_column: The column of the text in the latter two.

    Raises:
        DataError: A file is missing, is a folder, is empty, or has another extension.
    """
    stats = []
    for path in map(Path, files):
        if path.suffix not in _READERS:
            raise DataError(
                f"cannot read {path}: its extension must be one of {', '.join(_READERS)}; "
                "convert it, or rename it if only the extension is wrong"
            )
        if not path.is_file():
            raise DataError(f"there is no file {path}; check data.files")
        stat = path.stat()
        if stat.st_size == 0:
            raise DataError(f"{path} is empty; give a file that holds text")
        stats.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    return cache_key("files", 1, stats, text_column)


def read_files(files: list[str], text_column: str, cache: Path) -> "Dataset":
    """Read text files into a memory-mapped dataset with one column, "text".

    A .txt file is one document; a line of .jsonl and a row of .parquet are one document each.
    Empty documents are left out.

    Args:
        files: Paths; they decide the order of the documents.
        text_column: The column of the text in .jsonl and .parquet files.
        cache: Where the dataset is kept, so that the next call is quick.

    Raises:
        DataError: A file is missing, cannot be read, or holds no text.
    """
    import pyarrow as pa

    fingerprint = files_fingerprint(files, text_column)
    schema = pa.schema([("text", pa.large_string())])
    return cached_dataset(
        cache / f"text-{fingerprint}.arrow", schema, lambda: _batches(files, text_column, schema)
    )


def _batches(files: list[str], column: str, schema: "pa.Schema") -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa

    for texts in _chunks(text for path in files for text in _documents(Path(path), column)):
        yield pa.record_batch([pa.array(texts, pa.large_string())], schema=schema)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _documents(path: Path, column: str) -> Iterator[str]:
    found = False
    try:
        for text in _READERS[path.suffix](path, column):
            if text.strip():
                found = True
                yield text
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror or error})") from error
    if not found:
        raise DataError(f"{path} holds no text, only blanks; give a file that holds text")


def _read_txt(path: Path, _column: str) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from error
    if "\0" in text:
        raise DataError(f"{path} is not text: it holds NUL bytes; give a text file")
    yield text


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # malformed, or not UTF-8
                raise DataError(
                    f"{path} line {number} is not JSON ({error}); "
                    "every line must be one JSON object"
                ) from error
            if not isinstance(record, dict):
                raise DataError(f"{path} line {number} is not a JSON object; write {{...}}")
            if column not in record:
                raise _no_column(f"{path} line {number}", column, record)
            if not isinstance(record[column], str):
                kind = type(record[column]).__name__
                raise DataError(f"{path} line {number}: {column!r} holds {kind}, not a text")
            yield record[column]


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _no_column(str(path), column, file.schema_arrow.names)
            kind = file.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{path}: column {column!r} holds {kind}, not a text")
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not a Parquet file ({reason}); write it again") from error


def _no_column(place: str, column: str, columns: Iterable[str]) -> DataError:
    return DataError(
        f"{place} has no column {column!r}; it has {', '.join(columns)}; "
        "name the one that holds the text with data.text_column"
    )


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}

"""Local text files as documents, with errors that name the file and the line."""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foam_lightning.data.cache import cache_key, cached_dataset
from foam_lightning.errors import DataError, first_line
from foam_lightning.places import is_file

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_CHUNK_CHARACTERS = 2**23  # held in memory before a write
# Half of a character beyond 16 bits; without its other half it is no text, which JSON lets pass.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


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
        if not is_file(path):
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
        cache / f"text-{fingerprint}.arrow",
        schema,
        lambda: _batches(files, text_column, schema),
        content="text",
    )


def _batches(
    files: list[str], column: str, schema: "pa.Schema"
) -> Iterator[tuple["pa.RecordBatch", int]]:
    import pyarrow as pa

    for texts in _chunks(text for path in files for _, text in numbered(Path(path), column)):
        batch = pa.record_batch([pa.array(texts, pa.large_string())], schema=schema)
        yield batch, len(texts)


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


def numbered(path: Path, column: str, start: int = 0) -> Iterator[tuple[int, str]]:
    """Read the documents of one file, each with the place where reading goes on after it.

    What lies before that place is skipped without being parsed: lines of .jsonl, row groups of
    .parquet.

    Args:
        path: A .txt, .jsonl or .parquet file.
        column: The column of the text in the latter two.
        start: Where to begin: 0, or a place that came with a document.

    Yields:
        The lines (.jsonl), rows (.parquet) or documents (.txt) read so far, and the text.

    Raises:
        DataError: The file is gone, cannot be read, or holds no text.
    """
    found = start > 0
    try:
        for place, text in _READERS[path.suffix](path, column, start):
            if text.strip():
                found = True
                yield place, text
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror or error})") from error
    if not found:
        raise DataError(f"{path} holds no text, only blanks; give a file that holds text")


def _read_txt(path: Path, _column: str, start: int) -> Iterator[tuple[int, str]]:
    if start:
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from error
    if "\0" in text:
        raise DataError(f"{path} is not text: it holds NUL bytes; give a text file")
    yield 1, text


def _read_jsonl(path: Path, column: str, start: int) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number > start and line.strip():
                yield number, _text_of(line, f"{path} line {number}", column)


def parse_line(line: bytes, place: str) -> Any:
    """Parse a line of a .jsonl file.

    Args:
        line: As it is in the file.
        place: What to call it in an error.

    Raises:
        DataError: It is malformed, or not UTF-8.
    """
    try:
        content = json.loads(line)
        if _SURROGATE.search(line):
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place} is not JSON ({error}); every line must be one JSON object"
        ) from error
    return content


def _text_of(line: bytes, place: str, column: str) -> str:
    record = parse_line(line, place)
    if not isinstance(record, dict):
        raise DataError(f"{place} is not a JSON object; write {{...}}")
    if column not in record:
        raise _no_column(place, column, record)
    text = record[column]
    if not isinstance(text, str):
        raise DataError(f"{place}: {column!r} holds {type(text).__name__}, not a text")
    return text


def _read_parquet(path: Path, column: str, start: int) -> Iterator[tuple[int, str]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _no_column(str(path), column, file.schema_arrow.names)
            kind = file.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{path}: column {column!r} holds {kind}, not a text")
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = list(accumulate(sizes))
            groups = [group for group, end in enumerate(ends) if end > start]
            row = ends[groups[0]] - sizes[groups[0]] if groups else 0
            for batch in file.iter_batches(1024, row_groups=groups, columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if row > start and text is not None:
                        yield row, text
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path} is not a Parquet file ({first_line(error)}); write it again"
        ) from error


def _no_column(place: str, column: str, columns: Iterable[str]) -> DataError:
    return DataError(
        f"{place} has no column {column!r}; it has {', '.join(columns)}; "
        "name the one that holds the text with data.text_column"
    )


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}

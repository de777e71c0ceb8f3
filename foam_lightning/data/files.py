"""Read documents from local text files, at once or as resumable streams of shards."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from foam_lightning.data.cache import cache_key, cached_dataset
from foam_lightning.errors import ConfigError, DataError, first_line
from foam_lightning.storage.paths import is_file

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset


_CHUNK_CHARACTERS = 2**23  # in memory before each write
# A surrogate, half of a character beyond 16 bits. Unpaired ones are valid JSON but invalid text.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def files_fingerprint(files: list[str], text_column: str) -> str:
    """Hash path, size and modification time of files, without reading them.

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
                "convert or rename it"
            )
        if not is_file(path):
            raise DataError(f"there is no file {path}; check data.files")
        stat = path.stat()
        if stat.st_size == 0:
            raise DataError(f"{path} is empty; pass a file with text")
        stats.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    return cache_key("files", 1, stats, text_column)


def read_files(files: list[str], text_column: str, cache: Path) -> "Dataset":
    """Read text files into a memory-mapped dataset with one column, "text".

    A .txt file is one document; a line of .jsonl and a row of .parquet are one document each.
    Empty documents are left out.

    Args:
        files: Paths, in the order of the documents.
        text_column: The column of the text in .jsonl and .parquet files.
        cache: Folder in which the dataset is cached.

    Raises:
        DataError: A file is missing, unreadable, or without text.
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

    for texts in _chunks(text for path in files for _, text in read_documents(Path(path), column)):
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


def read_documents(path: Path, column: str, start: int = 0) -> Iterator[tuple[int, str]]:
    """Read the documents of one file, each with the position after it.

    Lines of .jsonl and row groups of .parquet before `start` are skipped without parsing.

    Args:
        path: A .txt, .jsonl or .parquet file.
        column: The column of the text in the latter two.
        start: Position to start from: 0, or one that came with a document.

    Yields:
        The number of lines (.jsonl), rows (.parquet) or documents (.txt) read so far, and the text.

    Raises:
        DataError: The file is missing, unreadable, or without text.
    """
    found = start > 0
    try:
        for position, text in _READERS[path.suffix](path, column, start):
            if text.strip():
                found = True
                yield position, text
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror or error})") from error
    if not found:
        raise DataError(f"{path} has no text, only whitespace; pass a file with text")


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
        raise DataError(f"{path} is not a text file: it contains NUL bytes; pass a text file")
    yield 1, text


def _read_jsonl(path: Path, column: str, start: int) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number > start and line.strip():
                yield number, _parse_text(line, f"{path} line {number}", column)


def parse_json_line(line: bytes, location: str) -> Any:
    """Parse a line of a .jsonl file.

    Args:
        line: The line in bytes.
        location: File and line, for errors.

    Raises:
        DataError: The line is not valid JSON in UTF-8.
    """
    try:
        content = json.loads(line)
        if _SURROGATE.search(line):
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{location} is not JSON ({error}); every line must be one JSON object"
        ) from error
    return content


def _parse_text(line: bytes, location: str, column: str) -> str:
    record = parse_json_line(line, location)
    if not isinstance(record, dict):
        raise DataError(f"{location} is not a JSON object {{...}}; write one per line")
    if column not in record:
        raise _missing_column(location, column, record)
    text = record[column]
    if not isinstance(text, str):
        raise DataError(
            f"{location}: {column!r} is {type(text).__name__}, not a string; set data.text_column"
        )
    return text


def _read_parquet(path: Path, column: str, start: int) -> Iterator[tuple[int, str]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _missing_column(str(path), column, file.schema_arrow.names)
            kind = file.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(
                    f"{path}: column {column!r} is {kind}, not a string; set data.text_column"
                )
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
            f"{path} is not a valid Parquet file ({first_line(error)}); create it again"
        ) from error


def _missing_column(location: str, column: str, columns: Iterable[str]) -> DataError:
    return DataError(
        f"{location} has no column {column!r}; it has {', '.join(columns)}; "
        "set data.text_column to the one with the text"
    )


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


# Line or row 10 (from 0) of every 20 is for validation: 5 %, as without streaming.
_HELD_OUT_EVERY = 20
_HELD_OUT = 10


class Shard(Protocol):
    """A part of a stream, read by one process at a time in a fixed order."""

    def read(self, position: Any) -> Iterator[str]:
        """Read the documents after a position; None is the beginning."""

    def position(self) -> Any:
        """Return the position after the document read last, as JSON values."""


class FileShard:
    """One local file.

    Args:
        path: A .txt, .jsonl or .parquet file.
        text_column: The column of the text in the latter two.
        held_out: True reads only the 11th of every 20 lines or rows, False the others, None all.
    """

    def __init__(self, path: Path, text_column: str, *, held_out: bool | None) -> None:
        self.path = path
        self.text_column = text_column
        self.held_out = held_out
        self._position = 0

    def read(self, position: int | None) -> Iterator[str]:
        """Read the documents after this number of lines or rows.

        Raises:
            DataError: The file is missing, unreadable, or without text.
        """
        self._position = position or 0
        for number, text in read_documents(self.path, self.text_column, self._position):
            self._position = number
            is_held_out = (number - 1) % _HELD_OUT_EVERY == _HELD_OUT
            if self.held_out is None or self.held_out == is_held_out:
                yield text

    def position(self) -> int:
        """Return the number of lines or rows read."""
        return self._position


@dataclass(frozen=True)
class FileStream:
    """Local files that are read while training, one shard each, without a cache."""

    shards: Sequence[FileShard]

    def __iter__(self) -> Iterator[dict[str, str]]:
        """Read all documents, file after file."""
        return ({"text": text} for shard in self.shards for text in shard.read(None))


class HubShard:
    """One shard of a streamed dataset.

    Args:
        documents: Only that shard, with the column "text".
        name: Its name in errors.
    """

    def __init__(self, documents: "IterableDataset", name: str) -> None:
        self.documents = documents
        self.name = name

    def read(self, position: dict[str, Any] | None) -> Iterator[str]:
        """Read the documents after a state of the dataset.

        Raises:
            DataError: The shard is missing or unreadable.
        """
        import datasets
        import fsspec

        fsspec.asyn.reset_lock()  # a forked worker may inherit it locked
        self.documents.load_state_dict(position)
        try:
            # Not `iter(documents)`, which assigns the shard to only one of several workers.
            for batch in self.documents.iter(batch_size=1):
                yield batch["text"][0]
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"cannot read {self.name} ({first_line(error)}); fix this, then run the same "
                "command again to resume"
            ) from error

    def position(self) -> dict[str, Any]:
        """Return the state of the dataset."""
        state: dict[str, Any] = self.documents.state_dict()
        return state


def open_file_streams(
    files: list[str], validation_files: list[str] | None, text_column: str
) -> tuple[FileStream, FileStream, str]:
    """Open local files as streams.

    Args:
        files: Paths of .txt, .jsonl or .parquet files.
        validation_files: Files to validate on; None holds out one in 20 lines or rows of `files`.
        text_column: The column of the text in .jsonl and .parquet files.

    Returns:
        The training stream, the validation stream, and their fingerprint.

    Raises:
        ConfigError: Without validation files, a .txt file: it is one document.
        DataError: A file is missing, or its first document is unreadable.
    """
    txt_files = [path for path in files if Path(path).suffix == ".txt"]
    if validation_files is None and txt_files:
        raise ConfigError(
            f"{txt_files[0]} is a single document, so streaming cannot hold out a part for "
            "validation; set data.validation_files, or remove data.streaming"
        )
    fingerprint = files_fingerprint(files, text_column)
    if validation_files is None:
        train, validation = (_stream(files, text_column, held_out) for held_out in (False, True))
    else:
        fingerprint = f"{fingerprint}-{files_fingerprint(validation_files, text_column)}"
        train, validation = (
            _stream(paths, text_column, None) for paths in (files, validation_files)
        )
    return train, validation, fingerprint


def list_shards(documents: "FileStream | IterableDataset", name: str) -> Sequence[Shard]:
    """List the shards of a stream.

    Args:
        documents: The stream.
        name: Of the dataset, for errors.
    """
    if isinstance(documents, FileStream):
        return documents.shards
    count = documents.num_shards
    return [
        HubShard(documents.shard(count, index), f"shard {index + 1} of {count} of {name}")
        for index in range(count)
    ]


def _stream(files: list[str], text_column: str, held_out: bool | None) -> FileStream:
    for path in files:
        next(read_documents(Path(path), text_column))
    return FileStream([FileShard(Path(path), text_column, held_out=held_out) for path in files])

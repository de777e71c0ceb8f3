"""Local text files as documents, with errors that name the file and the line."""

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


_HELD_OUT_EVERY = 20  # 5 percent, as of text that is not streamed
_HELD_OUT = 10


class Shard(Protocol):
    """A part of a stream that is read by one process at a time, in its own order."""

    def read(self, place: Any) -> Iterator[str]:
        """Read the documents after a place; from the beginning where it is None."""

    def place(self) -> Any:
        """Tell where the next reading has to begin, after the document read last."""


class FileShard:
    """One local file.

    Without files to validate on, the 11th of every 20 lines or rows is held out of training.

    Args:
        path: A .txt, .jsonl or .parquet file.
        text_column: The column of the text in the latter two.
        held_out: Read only what is held out (True), only the rest (False), or all (None).
    """

    def __init__(self, path: Path, text_column: str, *, held_out: bool | None) -> None:
        self.path = path
        self.text_column = text_column
        self.held_out = held_out
        self._place = 0

    def read(self, place: int | None) -> Iterator[str]:
        """Read the documents after so many lines or rows.

        Raises:
            DataError: The file is gone, cannot be read, or holds no text.
        """
        self._place = place or 0
        for number, text in numbered(self.path, self.text_column, self._place):
            self._place = number
            is_held_out = (number - 1) % _HELD_OUT_EVERY == _HELD_OUT
            if self.held_out is None or self.held_out == is_held_out:
                yield text

    def place(self) -> int:
        """Tell how many lines or rows have been read."""
        return self._place


@dataclass(frozen=True)
class FileStream:
    """Local files, read while training: a corpus larger than memory and cache.

    Attributes:
        shards: The files.
    """

    shards: Sequence[FileShard]

    def __iter__(self) -> Iterator[dict[str, str]]:
        """Read every document, file after file."""
        return ({"text": text} for shard in self.shards for text in shard.read(None))


class HubShard:
    """One shard of a streamed dataset.

    Args:
        documents: That shard alone, with the column "text".
        name: What it is, for errors.
    """

    def __init__(self, documents: "IterableDataset", name: str) -> None:
        self.documents = documents
        self.name = name

    def read(self, place: dict[str, Any] | None) -> Iterator[str]:
        """Read the documents after a state of the dataset.

        Raises:
            DataError: The shard is gone or cannot be read.
        """
        import datasets
        import fsspec

        fsspec.asyn.reset_lock()  # a worker process is a fork, whose lock may hang
        self.documents.load_state_dict(place)
        try:
            # Not `iter(documents)`, which would leave a shard to one of several workers.
            for batch in self.documents.iter(batch_size=1):
                yield batch["text"][0]
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"cannot read {self.name} ({first_line(error)}); type the same command again once "
                "it is there"
            ) from error

    def place(self) -> dict[str, Any]:
        """Copy the state of the dataset."""
        state: dict[str, Any] = self.documents.state_dict()
        return state


def file_streams(
    files: list[str], validation_files: list[str] | None, text_column: str
) -> tuple[FileStream, FileStream, str]:
    """Open local files to be read while training.

    Args:
        files: Paths of .txt, .jsonl or .parquet files.
        validation_files: Files to hold out; None holds out one in 20 lines or rows of `files`.
        text_column: The column of the text in .jsonl and .parquet files.

    Returns:
        What to train on, what to validate on, and a text that changes with them.

    Raises:
        ConfigError: A .txt file, which is one document, has nothing to hold out.
        DataError: A file is missing, or its beginning cannot be read.
    """
    single = [path for path in files if Path(path).suffix == ".txt"]
    if validation_files is None and single:
        raise ConfigError(
            f"{single[0]} is a single document, of which nothing can be held out while streaming; "
            "give data.validation_files, or leave data.streaming out"
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


def shards_of(documents: "FileStream | IterableDataset", name: str) -> Sequence[Shard]:
    """Cut a stream into its shards.

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
        next(numbered(Path(path), text_column))
    return FileStream([FileShard(Path(path), text_column, held_out=held_out) for path in files])

"""Read documents from local files, text or token ids, at once or as resumable streams."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from foam_lightning.data.cache import cache_key, cached_table
from foam_lightning.data.conversations import find_form
from foam_lightning.data.records import Record, format_of, read_records
from foam_lightning.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import IterableDataset

    from foam_lightning.data.table import Table


_CHUNK_CHARACTERS = 2**23  # in memory before each write
_MAX_TOKEN = 2**31


Document = str | list[int]
"""Text, or the token ids of an earlier run of the tokenizer."""
TOKENS = "input_ids"
"""The column of token ids, where a record has no text."""
_OTHER_COLUMNS = (TOKENS, "attention_mask", "labels")


def files_fingerprint(files: Sequence[Path], text_column: str) -> str:
    """Hash path, size and modification time of files, without reading them.

    Args:
        files: From `list_files`.
        text_column: The column of the text.
    """
    stats = [(path, path.stat()) for path in files]
    stamps = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return cache_key("files", 2, stamps, text_column)


def read_files(files: Sequence[Path], text_column: str, cache: Path) -> "Table":
    """Read files into a memory-mapped table with the columns "text" and "input_ids".

    A .txt file is one document; a record of another file is one document each. Empty documents are
    left out. Of the two columns a row has text, or else token ids.

    Args:
        files: From `list_files`, in the order of the documents.
        text_column: The column of the text.
        cache: Folder in which the table is cached.

    Raises:
        DataError: A file is unreadable, or without text.
    """
    import pyarrow as pa

    fingerprint = files_fingerprint(files, text_column)
    schema = pa.schema([("text", pa.large_string()), (TOKENS, pa.list_(pa.int32()))])
    return cached_table(
        cache / f"text-{fingerprint}.arrow",
        schema,
        lambda: _batches(files, text_column, schema),
        content="text",
    )


def documents_of(columns: Mapping[str, list[Any]]) -> list[Document]:
    """Return the documents of a batch from `read_files`, or of a dataset with text only."""
    texts = columns["text"]
    tokens = columns.get(TOKENS) or [None] * len(texts)
    return [ids if text is None else text for text, ids in zip(texts, tokens, strict=True)]


def _batches(
    files: Sequence[Path], column: str, schema: "pa.Schema"
) -> Iterator[tuple["pa.RecordBatch", int]]:
    import pyarrow as pa

    for documents in _chunks(one for path in files for _, one in read_documents(path, column)):
        texts = [one if isinstance(one, str) else None for one in documents]
        tokens = [None if isinstance(one, str) else one for one in documents]
        arrays = [pa.array(texts, schema.types[0]), pa.array(tokens, schema.types[1])]
        yield pa.record_batch(arrays, schema=schema), len(documents)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def read_documents(path: Path, column: str, start: int = 0) -> Iterator[tuple[int, Document]]:
    """Read the documents of one file, each with the position after it.

    Args:
        path: From `list_files`.
        column: The column of the text.
        start: Position to start from: 0, or one that came with a document.

    Yields:
        The number of lines or rows read so far, and the document.

    Raises:
        DataError: The file is missing, unreadable, or without text.
    """
    found = start > 0
    column = "text" if format_of(path) == ".txt" else column
    for record in read_records(path, start, columns=(column, *_OTHER_COLUMNS)):
        document = _document(record, column)
        if document and not (isinstance(document, str) and document.isspace()):
            found = True
            yield record.number, document
    if not found:
        raise DataError(f"{path} has no text, only whitespace; pass a file with text")


def _document(record: Record, column: str) -> Document | None:
    """Return the document of a record; None if its value is null in a table."""
    values, location = record.values, record.location
    if column not in record.names and TOKENS not in record.names:
        form = find_form(record.names)
        advice = "set data.text_column to the one with the text"
        raise DataError(
            f"{location} has no column {column!r}; it has {', '.join(record.names)}; "
            + (f"for conversations ({form.name}), set data.chat true" if form else advice)
        )
    name = column if column in record.names else TOKENS
    if name not in values:
        return None
    found = values[name]
    if isinstance(found, list):
        return _token_ids(found, record, name)
    if name != column:
        raise DataError(
            f"{location}: {name!r} is {type(found).__name__}, not a list of token ids; write them "
            "as .jsonl or .parquet, or set data.text_column"
        )
    if isinstance(found, bytes):
        return _decode(found, f"{location}: {name!r}")
    if not isinstance(found, str):
        raise DataError(
            f"{location}: {name!r} is {type(found).__name__}, not a string; set data.text_column"
        )
    return found


def _decode(content: bytes, location: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{location} is not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from error


def _token_ids(ids: list[Any], record: Record, name: str) -> list[int]:
    """Check token ids, and remove those that the record masks as padding."""
    if not all(type(token) is int and 0 <= token < _MAX_TOKEN for token in ids):
        raise DataError(
            f"{record.location}: {name!r} is a list, but not of token ids; set data.text_column to "
            "the column with the text"
        )
    if record.values.get("labels", ids) != ids:
        raise DataError(
            f"{record.location} has labels that differ from its token ids; set data.chat true, "
            "which makes each record a row and learns its labels"
        )
    mask = record.values.get("attention_mask", [1] * len(ids))
    if not isinstance(mask, list) or len(mask) != len(ids):
        raise DataError(f"{record.location}: the attention_mask is not as long as the token ids")
    return [token for token, is_text in zip(ids, mask, strict=True) if is_text]


# Line or row 10 (from 0) of every 20 is for validation: 5 %, as without streaming.
_HELD_OUT_EVERY = 20
_HELD_OUT = 10


class Shard(Protocol):
    """A part of a stream, read by one process at a time in a fixed order."""

    def read(self, position: Any) -> Iterator[Document]:
        """Read the documents after a position; None is the beginning."""

    def position(self) -> Any:
        """Return the position after the document read last, as JSON values."""


class FileShard:
    """One local file.

    Args:
        path: From `list_files`.
        text_column: The column of the text.
        held_out: True reads only the 11th of every 20 lines or rows, False the others, None all.
    """

    def __init__(self, path: Path, text_column: str, *, held_out: bool | None) -> None:
        self.path = path
        self.text_column = text_column
        self.held_out = held_out
        self._position = 0

    def read(self, position: int | None) -> Iterator[Document]:
        """Read the documents after this number of lines or rows.

        Raises:
            DataError: The file is missing, unreadable, or without text.
        """
        self._position = position or 0
        for number, document in read_documents(self.path, self.text_column, self._position):
            self._position = number
            is_held_out = (number - 1) % _HELD_OUT_EVERY == _HELD_OUT
            if self.held_out is None or self.held_out == is_held_out:
                yield document

    def position(self) -> int:
        """Return the number of lines or rows read."""
        return self._position


@dataclass(frozen=True)
class FileStream:
    """Local files that are read while training, one shard each, without a cache."""

    shards: Sequence[FileShard]

    def __iter__(self) -> Iterator[dict[str, Document]]:
        """Read all documents, file after file."""
        return ({"text": one} for shard in self.shards for one in shard.read(None))


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
    files: Sequence[Path], validation_files: Sequence[Path] | None, text_column: str
) -> tuple[FileStream, FileStream, str]:
    """Open local files as streams.

    Args:
        files: From `list_files`.
        validation_files: Files to validate on; None holds out one in 20 lines or rows of `files`.
        text_column: The column of the text.

    Returns:
        The training stream, the validation stream, and their fingerprint.

    Raises:
        ConfigError: Without validation files, a .txt file: it is one document.
        DataError: The first document of a file is unreadable.
    """
    txt_files = [path for path in files if format_of(path) == ".txt"]
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


def _stream(files: Sequence[Path], text_column: str, held_out: bool | None) -> FileStream:
    for path in files:
        next(read_documents(path, text_column))
    return FileStream([FileShard(path, text_column, held_out=held_out) for path in files])

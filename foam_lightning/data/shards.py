"""What a stream is cut into: files of this machine, or shards of a dataset on the Hub."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from foam_lightning.data.files import files_fingerprint, numbered
from foam_lightning.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    from datasets import IterableDataset

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

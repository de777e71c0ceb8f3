"""Open text: Python's standard library, local files, or a dataset of the Hugging Face Hub."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from foam_lightning.data.files import (
    TOKENS,
    FileStream,
    files_fingerprint,
    open_file_streams,
    read_files,
)
from foam_lightning.data.packing import evenly_spaced
from foam_lightning.data.records import list_files
from foam_lightning.errors import DataError, first_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from foam_lightning.data.mixture import SourceSettings
    from foam_lightning.data.table import Table


_SKIPPED_FOLDERS = {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "idle_test",
    "pydoc_data",  # the language reference as one string literal
    "site-packages",
    "test",
    "tests",
}
VALIDATION_FRACTION = 0.05
_VALIDATION_EVERY = 20  # one file in 20, by hash


class Document(NamedTuple):
    """One source file of the standard library.

    Attributes:
        name: Path relative to the library, with forward slashes.
        text: Content.
    """

    name: str
    text: str


def python_library_documents() -> Iterator[Document]:
    """Read the modules of Python's standard library, sorted by name, without tests.

    Yields:
        About 700 documents with 11 MB of text. Files that are not UTF-8 are skipped.

    Raises:
        DataError: This Python has no library sources, like some embedded ones.
    """
    library = Path(sysconfig.get_path("stdlib"))
    names = sorted(_source_files(library))
    if not names:
        raise DataError(
            f"the default corpus is Python's standard library, but {library} has no .py files; "
            "set data.files"
        )
    for name in names:
        try:
            text = (library / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document(name, text)


def is_held_out(name: str) -> bool:
    """Return whether a document is for validation: about 5 %, depending only on its name."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _VALIDATION_EVERY == 0


def _source_files(library: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS and not name.startswith("config-")
        ]
        for file in files:
            if file.endswith(".py"):
                yield Path(folder, file).relative_to(library).as_posix()


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Training and validation documents, each dataset with a column "text".

    Rows of a dataset of local files have either text or, in a column "input_ids", token ids.

    Attributes:
        train: Training documents.
        validation: Validation documents.
        fingerprint: Key of caches; changes whenever the documents may have changed.
    """

    train: "Table | Dataset | IterableDataset | FileStream"
    validation: "Table | Dataset | IterableDataset | FileStream"
    fingerprint: str


def open_source(source: "SourceSettings", *, streaming: bool, cache: Path) -> TextSource:
    """Open the files or the dataset of a source, or the default corpus if it names neither.

    Args:
        source: The settings of the source.
        streaming: Read it while training.
        cache: Folder in which files are cached unless they are streamed.

    Raises:
        DataError: The source is unreadable.
    """
    if source.files is not None:
        files = list_files(source.files)
        held_out = None
        if source.validation_files is not None:
            held_out = list_files(source.validation_files)
        if not streaming:
            return open_files(files, held_out, source.text_column, cache=cache)
        train, validation, fingerprint = open_file_streams(files, held_out, source.text_column)
        return TextSource(train=train, validation=validation, fingerprint=fingerprint)
    if source.dataset is not None:
        return open_dataset(
            source.dataset, source.dataset_config, source.text_column, streaming=streaming
        )
    return open_default_corpus()


def open_default_corpus() -> TextSource:
    """Open the default corpus: the source of Python's standard library."""
    from foam_lightning.data.table import Table

    digest = hashlib.sha256()
    train: list[str] = []
    validation: list[str] = []
    for name, text in python_library_documents():
        digest.update(f"{name}\0{text}\0".encode())
        (validation if is_held_out(name) else train).append(text)
    return TextSource(
        train=Table.from_texts(train),
        validation=Table.from_texts(validation),
        fingerprint=digest.hexdigest(),
    )


def open_files(
    files: Sequence[Path],
    validation_files: Sequence[Path] | None,
    text_column: str,
    *,
    cache: Path,
) -> TextSource:
    """Read local files.

    Args:
        files: From `list_files`.
        validation_files: Files to validate on; None holds out 5 % of the documents, or with too few
            of them the end of each.
        text_column: The column of the text.
        cache: Folder in which the documents are cached.

    Raises:
        DataError: A file is unreadable or without text.
    """
    documents = read_files(files, text_column, cache)
    fingerprint = files_fingerprint(files, text_column)
    if validation_files is None:
        train, validation = _split_validation(documents)
        fingerprint = f"{fingerprint}-{VALIDATION_FRACTION}"
    else:
        train, validation = documents, read_files(validation_files, text_column, cache)
        fingerprint = f"{fingerprint}-{files_fingerprint(validation_files, text_column)}"
    return TextSource(train=train, validation=validation, fingerprint=fingerprint)


def open_dataset(name: str, config: str | None, text_column: str, *, streaming: bool) -> TextSource:
    """Load the train and validation splits of a dataset of the Hugging Face Hub.

    Args:
        name: Name on the Hub, such as "allenai/c4".
        config: Configuration, such as "en"; None if there is only one.
        text_column: The column of the text.
        streaming: Read it over the network while training, instead of downloading it first.

    Raises:
        DataError: The package datasets cannot be imported; the Hub cannot be reached; the dataset,
            a split or the column is missing; or a split is empty.
    """
    try:
        import datasets
    except (ImportError, AttributeError) as error:  # the latter with an older pyarrow
        raise DataError(
            f"data.dataset {name!r} needs the package datasets, which cannot be imported "
            f"({first_line(error)}); run `pip install -U datasets pyarrow`, or set data.files"
        ) from error

    with _hub_errors(name):
        splits = datasets.load_dataset(name, config, streaming=streaming)
    for split in ("train", "validation"):
        if split not in splits:
            raise DataError(
                f"the dataset {name!r} has no split {split!r}; it has {', '.join(splits)}; "
                "choose a dataset with both train and validation, or set data.files"
            )
    with _hub_errors(name):
        train, validation = (
            _select_text(splits[split], name, split, text_column)
            for split in ("train", "validation")
        )
    fingerprint = json.dumps([name, config, text_column]) + "".join(
        str(getattr(splits[split], "_fingerprint", "")) for split in ("train", "validation")
    )
    return TextSource(train=train, validation=validation, fingerprint=fingerprint)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except ConnectionError as error:
        raise DataError(
            f"cannot reach the Hugging Face Hub for the dataset {name!r} ({first_line(error)}); "
            "download it beforehand, or set data.files"
        ) from error
    except Exception as error:  # many types, such as StopIteration for an empty file
        raise DataError(
            f"cannot load the dataset {name!r} from the Hugging Face Hub: {first_line(error)}; "
            "check data.dataset and data.dataset_config"
        ) from error


def _select_text(
    dataset: "Dataset | IterableDataset", name: str, split: str, column: str
) -> "Dataset | IterableDataset":
    # A stream may not know its columns before the first document.
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(
            f"the split {split!r} of the dataset {name!r} is empty; choose another dataset, or set "
            "data.files"
        )
    columns = dataset.column_names or list(first)
    if column not in columns:
        raise DataError(
            f"the dataset {name!r} has no column {column!r}; it has {', '.join(columns)}; "
            "set data.text_column to the one with the text"
        )
    dataset = dataset.select_columns([column])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def _split_validation(documents: "Table") -> tuple["Table", "Table"]:
    from foam_lightning.data.table import Table

    count = int(len(documents) * VALIDATION_FRACTION)
    if count == 0:
        train, validation = (
            Table.from_rows(
                [_part(row, is_held_out=held_out) for row in documents], documents.schema
            )
            for held_out in (False, True)
        )
        return train, validation
    held_out = evenly_spaced(count, len(documents))
    rest = np.delete(np.arange(len(documents)), held_out)
    return documents.select(rest), documents.select(held_out)


def _part(row: dict[str, Any], *, is_held_out: bool) -> dict[str, Any]:
    """Return the beginning of a document, or its last 5 %, which is held out."""
    name = TOKENS if row["text"] is None else "text"
    cut = len(row[name]) - int(len(row[name]) * VALIDATION_FRACTION)
    return {**row, name: row[name][cut:] if is_held_out else row[name][:cut]}

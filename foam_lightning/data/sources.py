"""Where the text comes from: this machine's Python, local files, or the Hugging Face Hub."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from foam_lightning.data.files import FileStream, file_streams, files_fingerprint, read_files
from foam_lightning.data.packing import even_subset
from foam_lightning.errors import DataError, first_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from foam_lightning.data.mixture import Source


_SKIPPED_FOLDERS = {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "idle_test",
    "pydoc_data",  # the language reference as one string literal: no code
    "site-packages",
    "test",
    "tests",
}
_VALIDATION_SHARE = 20  # one file in so many


class Document(NamedTuple):
    """One source file.

    Attributes:
        name: Its path below the library, with forward slashes.
        text: What it holds.
    """

    name: str
    text: str


def documents() -> Iterator[Document]:
    """Read every module of the standard library, sorted by name, tests left out.

    Yields:
        About 700 documents, 11 MB of text together. A file that is not UTF-8 is skipped.

    Raises:
        DataError: This Python carries no library sources, as an embedded one may.
    """
    library = Path(sysconfig.get_path("stdlib"))
    names = sorted(_source_files(library))
    if not names:
        raise DataError(
            f"the default corpus is Python's own library, and {library} holds no .py files; "
            "give your own text with data.files"
        )
    for name in names:
        try:
            text = (library / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document(name, text)


def is_validation(name: str) -> bool:
    """Tell whether a document is held out: about 5 percent are, whatever else is installed."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _VALIDATION_SHARE == 0


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


VALIDATION_FRACTION = 0.05


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Training and validation documents, each dataset with one column, "text".

    Attributes:
        train: Documents to learn from.
        validation: Documents held out.
        fingerprint: Changes whenever the documents may have changed; names what is cached.
    """

    train: "Dataset | IterableDataset | FileStream"
    validation: "Dataset | IterableDataset | FileStream"
    fingerprint: str


def open_source(source: "Source", *, streaming: bool, cache: Path) -> TextSource:
    """Open the files or the dataset of a source, or the default corpus if it names neither.

    Args:
        source: What the settings say.
        streaming: Read it while training.
        cache: Where files that are not streamed are kept in a form that is quick to open.

    Raises:
        DataError: It cannot be read.
    """
    if source.files is not None and streaming:
        train, validation, fingerprint = file_streams(
            source.files, source.validation_files, source.text_column
        )
        return TextSource(train=train, validation=validation, fingerprint=fingerprint)
    if source.files is not None:
        return files_source(source.files, source.validation_files, source.text_column, cache=cache)
    if source.dataset is not None:
        return hub_source(
            source.dataset, source.dataset_config, source.text_column, streaming=streaming
        )
    return corpus_source()


def corpus_source() -> TextSource:
    """Take the default corpus: the source of Python's standard library."""
    from datasets import Dataset

    digest = hashlib.sha256()
    train: list[str] = []
    validation: list[str] = []
    for name, text in documents():
        digest.update(f"{name}\0{text}\0".encode())
        (validation if is_validation(name) else train).append(text)
    return TextSource(
        train=Dataset.from_dict({"text": train}),
        validation=Dataset.from_dict({"text": validation}),
        fingerprint=digest.hexdigest(),
    )


def files_source(
    files: list[str],
    validation_files: list[str] | None,
    text_column: str,
    *,
    cache: Path,
    validation_fraction: float = VALIDATION_FRACTION,
) -> TextSource:
    """Read local files.

    Args:
        files: Paths of .txt, .jsonl or .parquet files.
        validation_files: Files to hold out; None holds out a share of the documents of `files`.
        text_column: The column of the text in .jsonl and .parquet files.
        cache: Where the documents are kept in a form that is quick to open.
        validation_fraction: That share. With too few documents to spare one, each gives the end
            of its text instead.

    Raises:
        DataError: A file cannot be read, or holds no text.
    """
    documents = read_files(files, text_column, cache)
    fingerprint = files_fingerprint(files, text_column)
    if validation_files is None:
        train, validation = _hold_out(documents, validation_fraction)
        fingerprint = f"{fingerprint}-{validation_fraction}"
    else:
        train, validation = documents, read_files(validation_files, text_column, cache)
        fingerprint = f"{fingerprint}-{files_fingerprint(validation_files, text_column)}"
    return TextSource(train=train, validation=validation, fingerprint=fingerprint)


def hub_source(name: str, config: str | None, text_column: str, *, streaming: bool) -> TextSource:
    """Load a dataset of the Hugging Face Hub, whose own splits are kept.

    Args:
        name: Its name there, such as "allenai/c4".
        config: Its configuration, such as "en"; None if it has only one.
        text_column: The column of the text.
        streaming: Read it over the network while training, rather than download it first.

    Raises:
        DataError: The Hub cannot be reached, the dataset, a split or the column is not there, or
            a split is empty.
    """
    import datasets

    with _naming_failure(name):
        splits = datasets.load_dataset(name, config, streaming=streaming)
    for split in ("train", "validation"):
        if split not in splits:
            raise DataError(
                f"the dataset {name!r} has no split {split!r}; it has {', '.join(splits)}; "
                "choose a dataset with both train and validation, or give files with data.files"
            )
    with _naming_failure(name):
        train, validation = (
            _text_only(splits[split], name, split, text_column) for split in ("train", "validation")
        )
    fingerprint = json.dumps([name, config, text_column]) + "".join(
        str(getattr(splits[split], "_fingerprint", "")) for split in ("train", "validation")
    )
    return TextSource(train=train, validation=validation, fingerprint=fingerprint)


@contextmanager
def _naming_failure(name: str) -> Iterator[None]:
    try:
        yield
    except ConnectionError as error:
        raise DataError(
            f"cannot reach the Hugging Face Hub for the dataset {name!r} ({first_line(error)}); "
            "download it beforehand, or give local files with data.files"
        ) from error
    except Exception as error:  # StopIteration where a file is empty, and what else there is
        raise DataError(
            f"cannot load the dataset {name!r} from the Hugging Face Hub: {first_line(error)}; "
            "check data.dataset and data.dataset_config"
        ) from error


def _text_only(
    dataset: "Dataset | IterableDataset", name: str, split: str, column: str
) -> "Dataset | IterableDataset":
    # A stream may not know its columns before its first document.
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(
            f"the split {split!r} of the dataset {name!r} is empty; choose another dataset, or "
            "give files with data.files"
        )
    columns = dataset.column_names or list(first)
    if column not in columns:
        raise DataError(
            f"the dataset {name!r} has no column {column!r}; it has {', '.join(columns)}; "
            "name the one that holds the text with data.text_column"
        )
    dataset = dataset.select_columns([column])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def _hold_out(documents: "Dataset", fraction: float) -> tuple["Dataset", "Dataset"]:
    from datasets import Dataset

    count = int(len(documents) * fraction)
    if count == 0:
        texts = list(documents["text"])
        cuts = [len(text) - int(len(text) * fraction) for text in texts]
        return (
            Dataset.from_dict(
                {"text": [text[:cut] for text, cut in zip(texts, cuts, strict=True)]}
            ),
            Dataset.from_dict(
                {"text": [text[cut:] for text, cut in zip(texts, cuts, strict=True)]}
            ),
        )
    held_out = even_subset(count, len(documents))
    kept = np.delete(np.arange(len(documents)), held_out)
    return documents.select(kept), documents.select(held_out)

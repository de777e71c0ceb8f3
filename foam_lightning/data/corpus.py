"""The default corpus: the source of Python's standard library, already on this machine."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from foam_lightning.errors import DataError

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

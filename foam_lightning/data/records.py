"""Files of records: found by name, folder or pattern, unpacked, and read one record at a time."""

import csv
import glob
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from foam_lightning.data.notices import print_once
from foam_lightning.errors import DataError, first_line
from foam_lightning.storage.paths import exists, expand_user, is_file, is_folder

# A surrogate, half of a character beyond 16 bits. Unpaired ones are valid JSON but invalid text.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """A record of a file.

    Attributes:
        number: The number of lines or rows of the file up to its end.
        location: File and line, for errors.
        values: Its values by name, without those that are null in a table.
        names: All names, of which `values` may have only those asked for.
    """

    number: int
    location: str
    values: dict[str, Any]
    names: Sequence[str]


def list_files(paths: Sequence[str] | str) -> list[Path]:
    """List the files of paths, folders and patterns, in this order and sorted within each.

    A folder stands for all files in it, at any depth, whose format can be read, without hidden
    ones. If others are left out, a line on stderr says so.

    Args:
        paths: One or several files, folders, or patterns such as "texts/**/*.jsonl.gz".

    Raises:
        DataError: A file is missing or empty, its format cannot be read, a folder has no file that
            can be read, or a pattern matches none.
    """
    found: list[Path] = []
    for name in [paths] if isinstance(paths, str) else paths:
        if not name:
            raise DataError("data.files has an empty path, which would be this folder; write .")
        path = expand_user(name)
        if exists(path) or not glob.has_magic(name):
            found += _files_in(path) if is_folder(path) else [path]
            continue
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 pathlib's takes no absolute
        files = [path for path in map(Path, sorted(matches)) if is_file(path)]
        if not files:
            raise DataError(f"no file matches {name}; check the pattern")
        found += files
    for path in found:
        _check(path)
    return found


def name_files(paths: Sequence[Path | str] | str) -> str:
    """Return a short name of files in messages: the first one, and the number of others."""
    first, *others = [paths] if isinstance(paths, str) else paths
    return f"{first} and {len(others)} more" if others else str(first)


def _files_in(folder: Path) -> list[Path]:
    visible = [
        path
        for path in sorted(folder.rglob("*"))
        if is_file(path) and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    found = [path for path in visible if _split_suffix(path)[0] in _READERS]
    if not found:
        raise DataError(f"the folder {folder} has no file to read; {_allowed()}")
    if len(found) < len(visible):
        kinds = ", ".join(sorted({path.suffix or path.name for path in visible} - _suffixes(found)))
        print_once(
            f"{folder}: {len(found)} files are read, {len(visible) - len(found)} of other "
            f"kinds left out ({kinds})"
        )
    return found


def _suffixes(paths: Iterable[Path]) -> set[str]:
    return {path.suffix for path in paths}


def _check(path: Path) -> None:
    if not is_file(path):
        raise DataError(f"there is no file {path}; check the path")
    if _split_suffix(path)[0] not in _READERS:
        raise DataError(f"cannot read {path}: {_allowed()}; convert or rename it")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; pass a file with text")


def _allowed() -> str:
    return (
        f"its extension must be one of {', '.join(_READERS)}, all but the last also with "
        f"{' or '.join(_OPENERS)} after it"
    )


def format_of(path: Path) -> str:
    """Return the format of a file from `list_files`: its extension, without that of a packer."""
    return _split_suffix(path)[0]


def _split_suffix(path: Path) -> tuple[str, str]:
    """Return the format of a file and how it is packed; both in lower case, or ""."""
    packed = path.suffix.lower()
    if packed not in _OPENERS:
        return packed, ""
    inner = Path(path.stem).suffix.lower()
    return ("" if inner == ".parquet" else inner), packed


def read_records(
    path: Path, start: int = 0, *, columns: Sequence[str] | None = None
) -> Iterator[Record]:
    """Read the records of a file; a .txt file is one, with the value "text".

    A .jsonl or .json file is one JSON object a line, or an array of objects, which is parsed as a
    whole. Lines of the former and row groups of .parquet before `start` are skipped without
    parsing.

    Args:
        path: The file, from `list_files`.
        start: The `number` of the last record not to read.
        columns: Names of the values to read at least; None reads all.

    Raises:
        DataError: The file cannot be read, or a record is none.
    """
    with _read_errors(path):
        yield from _READERS[format_of(path)](path, start, columns)


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"cannot read {path} ({reason})") from error


def _open(path: Path) -> io.BufferedReader:
    return _OPENERS.get(path.suffix.lower(), _open_plain)(path)


def _open_plain(path: Path) -> io.BufferedReader:
    return path.open("rb")


def _open_gzip(path: Path) -> io.BufferedReader:
    return io.BufferedReader(gzip.GzipFile(path))


def _open_zstd(path: Path) -> io.BufferedReader:
    import pyarrow as pa  # Python itself has Zstandard from 3.14 on

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


_OPENERS = {".gz": _open_gzip, ".zst": _open_zstd}


def _read_json(path: Path, start: int, _columns: Sequence[str] | None) -> Iterator[Record]:
    with _open(path) as file:
        if file.peek().removeprefix(_BOM).lstrip().startswith(b"["):
            yield from _read_array(path, file.read(), start)
            return
        for number, line in enumerate(file, start=1):
            if number > start and line.removeprefix(_BOM).strip():
                location = f"{path} line {number}"
                yield _json_record(_parse_json(line, location), number, location)


def _read_array(path: Path, content: bytes, start: int) -> Iterator[Record]:
    for number, values in enumerate(_parse_json(content, str(path)), start=1):
        if number > start:
            yield _json_record(values, number, f"{path} item {number}")


def _parse_json(content: bytes, location: str) -> Any:
    try:
        values = json.loads(content)
        if _SURROGATE.search(content):
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{location} is not JSON ({error}); write one JSON object a line, or an array of them"
        ) from error
    return values


def _json_record(values: Any, number: int, location: str) -> Record:
    if not isinstance(values, dict):
        raise DataError(f"{location} is not a JSON object {{...}}; write one per line")
    return Record(number, location, values, list(values))


def _read_csv(path: Path, start: int, _columns: Sequence[str] | None) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # a document is longer than the default of 128 kB
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for number, values in enumerate(reader, start=1):
                location = f"{path} line {reader.line_num}"
                if len(values) > len(reader.fieldnames or ()) or None in values.values():
                    raise DataError(
                        f"{location} has another number of fields than the first line, which names "
                        "the columns; put fields with commas or line ends in double quotes"
                    )
                if number > start:
                    yield Record(number, location, values, list(values))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} line {reader.line_num + 1} is not CSV in UTF-8 ({first_line(error)}); "
                "export it again"
            ) from error


def _read_parquet(path: Path, start: int, columns: Sequence[str] | None) -> Iterator[Record]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = names if columns is None else [n for n in columns if n in names] or names[:1]
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = list(accumulate(sizes))
            groups = [group for group, end in enumerate(ends) if end > start]
            row = ends[groups[0]] - sizes[groups[0]] if groups else 0
            for batch in file.iter_batches(1024, row_groups=groups, columns=wanted):
                for row_values in batch.to_pylist():
                    row += 1
                    if row > start:
                        values = _without_nulls(row_values)
                        yield Record(row, f"{path} row {row}", values, names)
    except pa.ArrowException as error:
        raise DataError(
            f"{path} is not a valid Parquet file ({first_line(error)}); create it again"
        ) from error


def _without_nulls(value: Any) -> Any:
    """Remove null values: a table has every key of any row, also within its objects."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_without_nulls(one) for one in value]
    return value


def _read_txt(path: Path, start: int, _columns: Sequence[str] | None) -> Iterator[Record]:
    if start:
        return
    with _open(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from error
    if "\0" in text:
        raise DataError(f"{path} is not a text file: it contains NUL bytes; pass a text file")
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads texts
    yield Record(1, str(path), {"text": text}, ["text"])


_READERS: dict[str, Callable[[Path, int, Sequence[str] | None], Iterator[Record]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

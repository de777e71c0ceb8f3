"""What a campaign has found: one JSON line for each result, on disk before the next one begins."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS, PAGE, LOG = "results.jsonl", "page.md", "log.txt"
Line = Mapping[str, Any]


def read_lines(folder: Path) -> list[Line]:
    """Read the lines so far; one that a kill has torn is left out."""
    lines = []
    path = folder / RESULTS
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def append(folder: Path, line: Line) -> None:
    """Rewrite the page with a line in it, and add the line to the results."""
    from tests.benchmarks.stages.page import write_page

    # The page goes first, so that it never lacks a line that the results have.
    with suppress(Exception):  # whatever is wrong with the page, the results go on
        write_page(folder, [*read_lines(folder), line])
    text = json.dumps(line, default=str) + "\n"
    descriptor = os.open(folder / RESULTS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            text = "\n" + text  # after a torn line
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Record:
    """The results of one stage; also usable from processes that the stage starts.

    Attributes:
        folder: Of the campaign.
        stage: Name of the stage.
    """

    folder: Path
    stage: str

    def row(self, name: str, **values: Any) -> None:
        """Add a row of the stage's table, or replace the row of this name.

        Args:
            name: The first column.
            values: The other columns. Names end in `_bytes`, `_seconds` or `_per_second` where
                the values have units; `failure` says why there are none.
        """
        append(self.folder, {"stage": self.stage, "row": name, "values": values})

    def note(self, text: str) -> None:
        """Add a sentence above the stage's table; the last one also sums the stage up."""
        append(self.folder, {"stage": self.stage, "note": text})

    def has(self, name: str) -> bool:
        """Whether this row is there, and not as a failure, because an earlier campaign made it."""
        return name in finished_rows(read_lines(self.folder), self.stage)


def finished_rows(lines: Sequence[Line], stage: str) -> set[str]:
    """Name the rows of a stage that have values."""
    return {
        line["row"]
        for line in lines
        if line.get("stage") == stage and "row" in line and "failure" not in line["values"]
    }


@dataclass(frozen=True)
class Setting:
    """What a stage is given.

    Attributes:
        device: "cpu" or "cuda".
        tiny: Models and texts so small that every stage takes seconds on a CPU.
        text: A folder of text to train on; None takes the source of Python's standard library.
        record: Takes the results.
        end: The moment of `time.monotonic` at which the stage is killed.
    """

    device: str
    tiny: bool
    text: Path | None
    record: Record
    end: float

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def text_files(self, *suffixes: str) -> list[Path]:
        """List the files of the folder of text with one of these suffixes."""
        paths = sorted(self.text.iterdir()) if self.text else []
        return [path for path in paths if path.suffix in suffixes]

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def missing(self, names: Sequence[str], least_seconds: float = 0.0) -> Iterator[str]:
        """Yield the rows that are not there yet, as long as there is time for another.

        Args:
            names: The rows, the most important first.
            least_seconds: A row takes about this long.
        """
        for name in names:
            if self.record.has(name):
                continue
            if self.seconds_left() < least_seconds:
                self.record.row(name, failure="no time left")
            else:
                yield name

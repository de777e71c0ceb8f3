"""The first lines of every results page: commit, date and machine; and where the page goes."""

from collections.abc import Iterable
from pathlib import Path

from tests.benchmarks.commit import ROOT, commit_and_date
from tuner.comparison.profile import machine, packages, processor

__all__ = ["ROOT", "commit_and_date", "machine", "packages", "processor", "publish"]


def publish(lines: Iterable[str], output: Path | None) -> None:
    """Print a page, and write it to a file if one is given."""
    page = "\n".join(lines) + "\n"
    print(page)
    if output is not None:
        output.write_text(page, encoding="utf-8")

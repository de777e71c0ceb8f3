"""The first lines of every results page: commit, date and machine; and where the page goes."""

import datetime
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tuner.comparison.profile import machine, packages, processor

__all__ = ["ROOT", "commit_and_date", "machine", "packages", "processor", "publish"]

ROOT = Path(__file__).parent.parent.parent


def _commit() -> str:
    """Return the short hash of the checked-out commit, or "unknown" outside a repository."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def commit_and_date() -> str:
    """Return the commit and today's date, as results pages state them."""
    return f"commit {_commit()}, {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}"


def publish(lines: Iterable[str], output: Path | None) -> None:
    """Print a page, and write it to a file if one is given."""
    page = "\n".join(lines) + "\n"
    print(page)
    if output is not None:
        output.write_text(page, encoding="utf-8")

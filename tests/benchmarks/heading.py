"""What every benchmark says above its table, commit and machine, and where it says it."""

import datetime
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tuner.comparison.profile import machine, packages, processor

__all__ = ["ROOT", "commit", "dated", "machine", "packages", "processor", "publish"]

ROOT = Path(__file__).parent.parent.parent


def commit() -> str:
    """Name the commit that is checked out, or say that the files are no repository."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def dated() -> str:
    """Name the commit and the day."""
    return f"commit {commit()}, {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}"


def publish(lines: Iterable[str], output: Path | None) -> None:
    """Print a page, and keep it in a file where one is named."""
    page = "\n".join(lines) + "\n"
    print(page)
    if output is not None:
        output.write_text(page, encoding="utf-8")

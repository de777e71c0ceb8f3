"""Where the repository is, and its commit; imports nothing, so that a command starts at once."""

import datetime
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def read_commit() -> str:
    """Return the short hash of the checked-out commit, or "unknown" outside a repository."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def commit_and_date() -> str:
    """Return the commit and today's date, as results pages state them."""
    return f"commit {read_commit()}, {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}"

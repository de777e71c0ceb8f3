"""Every kind of bad input ends in one line, with the documented exit code, and leaves nothing."""

import hashlib
from pathlib import Path

from tests import bad_input
from tests.tiny import write_settings

CASES = [*bad_input.USAGE, *bad_input.BUDGETS, *bad_input.INFEASIBLE, *bad_input.NUMBERS, *bad_input.YAML, *bad_input.HOSTILE]


def tree(folder: Path) -> dict[str, str]:
    """Name everything in a folder with a digest of its content, caches left out."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        )
        for path in sorted(folder.rglob("*"))
        if "cache" not in path.relative_to(folder).parts
    }


def make_good(folder: Path) -> None:
    settings = write_settings(folder)
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace(f"runs: {folder}/runs", "runs: runs"), encoding="utf-8")

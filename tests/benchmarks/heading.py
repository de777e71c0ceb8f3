"""What every benchmark says above its table, commit and machine, and where it says it."""

import datetime
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent


def commit() -> str:
    """Name the commit that is checked out, or say that the files are no repository."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def packages(*names: str) -> str:
    """Name the versions of Python and of installed packages."""
    found = [f"python {platform.python_version()}"]
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def processor() -> str:
    """Name the processor as the system does."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def dated() -> str:
    """Name the commit and the day."""
    return f"commit {commit()}, {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}"


def machine() -> str:
    """Name the processor, and how much of it torch uses."""
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def publish(lines: Iterable[str], output: Path | None) -> None:
    """Print a page, and keep it in a file where one is named."""
    page = "\n".join(lines) + "\n"
    print(page)
    if output is not None:
        output.write_text(page, encoding="utf-8")

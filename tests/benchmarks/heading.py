"""What every benchmark says above its table: the commit and the machine."""

import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def commit() -> str:
    """Name the commit that is checked out."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def processor() -> str:
    """Name the processor as the system does."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()

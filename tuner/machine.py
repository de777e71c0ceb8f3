"""What a measurement was made with: processor or GPU, threads, versions."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def processor() -> str:
    """Name the processor as the system does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def machine() -> str:
    """Name the processor, and how much of it torch uses."""
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def packages(*names: str) -> str:
    """Name the versions of Python and of installed packages."""
    found = [f"python {platform.python_version()}"]
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)

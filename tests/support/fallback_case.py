"""A tiny run on a device that can be made too small for it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from foam_lightning.job import Job
from foam_lightning.plan import MemoryOptions
from tests.support.tiny import REPOSITORY, write_settings
from tuner.config.parser import parse
from tuner.planning.planner import BudgetPlanner


class FallbackCase:
    """A run by a plan at level 2, and the memory options that it may fall back to.

    Args:
        folder: Gets the run.
        words: Further options.
        settings: Of a run named "default" in `folder`; by default those of a tiny one.
    """

    def __init__(self, folder: Path, *words: str, settings: Path | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.words = ["--config", str(settings or write_settings(folder)), *words]
        self.job: Job = parse("fit", self.words, default=None).job()
        self.planner = BudgetPlanner(self.job, None)
        self.plan = self.job.uniform_plan(2)
        self.folder = folder / "runs" / "default" / "version_0"
        self.checkpoint = self.folder / "checkpoints" / "last.ckpt"

    def peak(self, memory_options: MemoryOptions) -> int:
        return self.planner.accountant.account(
            replace(self.plan, memory_options=memory_options)
        ).peak_bytes

    def options_in_order(self, most: int = 99) -> list[MemoryOptions]:
        """List the plan's own memory options, then those of one fall-back after the other."""
        found = [self.plan.memory_options]
        while len(found) < most:
            smaller = self.planner.ladder.find_smaller(found[-1], self.peak)
            if smaller is None:
                break
            found.append(smaller)
        return found

    @property
    def second(self) -> MemoryOptions:
        return self.options_in_order(2)[1]

    @property
    def limit(self) -> int:
        """A limit between the plan's own peak and that of the first fall-back."""
        return (self.peak(self.plan.memory_options) + self.peak(self.second)) // 2

    def start(self, limit: int, *options: str) -> "subprocess.Popen[str]":
        words = [str(limit), str(self.checkpoint), *options, "fit", *self.words]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.limited", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def summary(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return content

    def fallback(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "fallback.json").read_text())
        return content


def leftovers(folder: Path) -> list[str]:
    """List temporary files that no run may leave behind."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix in (".part", ".tmp") or path.name == "rehearsal.ckpt"
    ]

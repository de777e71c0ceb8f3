"""The runs of one measurement, kept beside its results so that an interrupted one goes on."""

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from tests.benchmarks.damage import DamageProbe
from tuner.kept import Kept
from tuner.objective import Bench, ShortRun

RmsByRole = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: The levels.
        rule: Where the scales come from.
        plan: What is run.
    """

    name: str
    rule: str
    plan: FoldPlan

    def key(self, seed: int, num_steps: int) -> str:
        text = json.dumps([self.plan.to_json(), seed, num_steps])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def say(text: str) -> None:
    """Print a line with the time of day, for whoever waits."""
    print(f"{datetime.datetime.now(tz=datetime.UTC):%H:%M:%S} {text}", flush=True)


class Runs:
    """The runs done so far, kept beside the results.

    Args:
        job: What to train.
        num_steps: Optimizer steps of each run.
        path: Where to keep them; None keeps none.
    """

    def __init__(self, job: Job, num_steps: int, path: Path | None) -> None:
        self._bench = Bench(job)
        self._num_steps = num_steps
        self._kept = Kept(path)

    def probed(self, row: Row, at_steps: Sequence[int]) -> dict[int, RmsByRole]:
        """Run a row on seed 0 and measure the RMS of the update at these steps."""
        probes = {step: DamageProbe(step) for step in at_steps}
        done = self._run(row, 0, list(probes.values()), lambda: [p.rms for p in probes.values()])
        return {
            step: {
                role: {int(level): value for level, value in by_level.items()}
                for role, by_level in rms.items()
            }
            for step, rms in zip(at_steps, done["rms"], strict=True)
        }

    def of(self, row: Row, seed: int) -> ShortRun:
        """Give the run of a row, done now or before."""
        done = self._run(row, seed, [])
        return ShortRun(done["nats"], done["num_tokens"])

    def _run(
        self,
        row: Row,
        seed: int,
        callbacks: Sequence[Callback],
        measured: Callable[[], list[Any]] = list,
    ) -> Any:
        def measure() -> Any:
            run = self._bench.run(
                row.plan, num_steps=self._num_steps, seed=seed, callbacks=callbacks
            )
            say(f"seed {seed}: {row.name}, {row.rule}: {run.loss:.4f}")
            return {
                "row": f"{row.name}, {row.rule}",
                "nats": list(run.nats),
                "num_tokens": list(run.num_tokens),
                "rms": measured(),
            }

        return self._kept.of(row.key(seed, self._num_steps), measure)

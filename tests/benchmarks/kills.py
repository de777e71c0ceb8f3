"""What does `kill -9` cost? Random ones across tune, fit and export, each gone on with.

    python -m tests.benchmarks.kills [--kills 50] [--seed 0] [--output FILE]

A tiny job is tuned, trained and exported once undisturbed. Then again, in folders of their own,
killed at random moments and gone on with by the same command each time, until all kills are done.
What is finished after every kill is compared with what there was before it, and what comes out in
the end with the undisturbed run, bit for bit.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from foam_lightning.training import versions
from tests.benchmarks.heading import commit_and_date, machine, publish
from tests.faults.killing import (
    PATIENCE_SECONDS,
    Place,
    Trial,
    has_stepped,
    killed_after,
    load_modules,
    moments,
    timed,
)

PHASES = {
    "tune": "tune",
    "fit": "fit, before its first step",
    "train": "fit, from its first step on",
    "export": "export",
}
_SHARES = {"tune": 0.4, "fit": 0.12, "train": 0.32, "export": 0.16}
_MOST_A_ROUND = {"tune": 5, "fit": 2, "train": 4, "export": 2}


@dataclass
class Kills:
    """What was seen.

    Attributes:
        undisturbed: The run that nothing happens to.
        moments: Of the kills, by phase, in seconds after the command began.
        resumed: Kills after which the same command went on, by phase.
        trials_lost: Finished trials that were gone or others after a kill.
        steps_lost: Steps that a kill undid, one number for each kill of `fit`.
        differences: What came out otherwise than in the undisturbed run; files left behind.
        num_runs: Runs that were killed again and again and came to their end.
    """

    undisturbed: Place
    moments: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PHASES})
    resumed: Counter[str] = field(default_factory=Counter)
    trials_lost: int = 0
    steps_lost: list[int] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    num_runs: int = 0

    def measure(self, quotas: dict[str, int], seed: int) -> None:
        """Kill until every phase has had its kills.

        Args:
            quotas: Kills by phase.
            seed: Decides the moments.
        """
        moment = moments(seed)
        expected, seconds = self._calm()
        while any(len(self.moments[phase]) < quotas[phase] for phase in PHASES):
            self.num_runs += 1
            place = Place(self.undisturbed.folder / str(self.num_runs), **self._sizes())
            for phase in PHASES:
                left = quotas[phase] - len(self.moments[phase])
                most = min(left, _MOST_A_ROUND[phase])
                # A search goes on from kill to kill; the others have a beginning to repeat.
                longest = seconds[phase] * (2 / (most + 1) if phase == "tune" else 1)
                self._kill(place, phase, [moment(longest) for _ in range(most)])
            self._compare(place, expected)

    def _calm(self) -> tuple[object, dict[str, float]]:
        """Do the undisturbed run; give its trials and how long each phase took."""
        calm = self.undisturbed
        load_modules()
        seconds = {"tune": timed(calm, "tune")}
        began = time.monotonic()
        process = calm.start("fit")
        assert has_stepped(calm, process), calm.said
        seconds["fit"] = time.monotonic() - began
        assert killed_after(process, PATIENCE_SECONDS) == 0, calm.said
        seconds["train"] = time.monotonic() - began - seconds["fit"]
        seconds["export"] = timed(calm, "export")
        return _losses(calm), seconds

    def _kill(self, place: Place, phase: str, at: list[float]) -> None:
        command = "fit" if phase == "train" else phase
        done: set[Trial] = set()
        code = None
        for seconds in at:
            process = place.start(command)
            if phase == "train":
                has_stepped(place, process)
                seconds *= 1 - place.steps_kept() / place.max_steps
            if (code := killed_after(process, seconds)) is not None:
                break  # it was quicker
            self.moments[phase].append(seconds)
            now = place.trials_done()
            self.trials_lost += len(done - now)
            done = now
            if command == "fit":
                self.steps_lost.append(place.steps_lost())
            if phase == "export" and place.exported.exists():
                code = 0  # all was written, and only the last line was not said
                break
        if code is None and phase != "fit":  # whose next kill is in training
            code = killed_after(place.start(command), PATIENCE_SECONDS)
        if code in (0, None):
            self.resumed[phase] = len(self.moments[phase])
        else:
            self.differences.append(f"{phase} ended with {code}: {place.said[-300:]}")

    def _compare(self, place: Place, expected: object) -> None:
        calm = self.undisturbed
        versions = [path.name for path in place.run.parent.iterdir()]
        pairs = {
            "trials": (_losses(place), expected),
            "versions": (versions, ["version_0"]),
            "plan": (_text(place.run / "fold_plan.json"), _text(calm.run / "fold_plan.json")),
            "loss": (self.loss(place), self.loss(calm)),
            "export": (_weights_file(place), _weights_file(calm)),
        }
        self.differences += [name for name, (found, wanted) in pairs.items() if found != wanted]
        self.differences += place.leftovers()
        found, wanted = place.weights(), calm.weights()
        if not all(torch.equal(found[name], tensor) for name, tensor in wanted.items()):
            self.differences.append("weights")

    @staticmethod
    def loss(place: Place) -> float:
        return place.summary()["final_validation_loss"]

    def _sizes(self) -> dict[str, int]:
        calm = self.undisturbed
        return {"max_steps": calm.max_steps, "trials": calm.trials, "steps": calm.steps}


def page(kills: Kills, seed: int) -> list[str]:
    """Lay out what was found."""
    calm = kills.undisturbed
    rows = [
        f"| {PHASES[phase]} | {len(at)} | {kills.resumed[phase]} | {min(at):.1f} to {max(at):.1f} |"
        for phase, at in kills.moments.items()
        if at
    ]
    num = sum(map(len, kills.moments.values()))
    same = "the same, bit for bit" if not kills.differences else ", ".join(kills.differences)
    return [
        f"# {num} kills at random moments",
        "",
        f"- command: `python -m tests.benchmarks.kills {' '.join(sys.argv[1:])}`".rstrip(),
        f"- {commit_and_date()}",
        f"- {machine()}",
        "- " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"- a model of hidden size 32, a search of {calm.trials} short runs of {calm.steps} steps, "
        f"{calm.max_steps} steps in all; moments drawn with seed {seed}",
        "",
        "SIGKILL at a random moment of the command, whose modules are loaded before; then the same "
        "command again.",
        "",
        "| phase | kills | gone on | seconds after the beginning of the phase |",
        "|---|---|---|---|",
        *rows,
        "",
        "| what | found |",
        "|---|---|",
        f"| runs that came to their end | {kills.num_runs} |",
        f"| finished trials lost | {kills.trials_lost} of {len(calm.trials_done())} a run |",
        f"| most steps lost by a kill | {max(kills.steps_lost, default=0)}, "
        f"{sum(1 for lost in kills.steps_lost if lost)} kills lost any |",
        f"| steps between two checkpoints | {calm.interval} |",
        f"| final loss undisturbed | {kills.loss(calm):.6f} |",
        f"| trials, plan, loss, weights and exported file of every run | {same} |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quotas = {phase: round(share * arguments.kills) for phase, share in _SHARES.items()}
    with tempfile.TemporaryDirectory() as folder:
        kills = Kills(Place(Path(folder), max_steps=240, trials=4, steps=30))
        kills.measure(quotas, arguments.seed)
        publish(page(kills, arguments.seed), arguments.output)


def _losses(place: Place) -> list[tuple[str, float | None]]:
    """List the losses of a search in their order; a trial that was killed leaves its number."""
    return [(stage, loss) for stage, _, loss in sorted(place.trials_done())]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _weights_file(place: Place) -> bytes:
    return (place.exported / "model.safetensors").read_bytes()


if __name__ == "__main__":
    main()

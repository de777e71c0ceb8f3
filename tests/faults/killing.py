"""Commands in processes that can be killed at any moment, and what they leave.

The processes are forked with all modules loaded, so that a random moment is not one of importing.
"""

import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import torch
import yaml
from lightning.pytorch import Trainer

import cli
from foam_lightning.callbacks.export import Export
from foam_lightning.checkpoint.load import find_intact_checkpoint
from tests.support.tiny import write_settings

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [__name__, "alembic.command", "sqlalchemy.orm", "tuner.config.parser"]
)
FINISHED = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
PATIENCE_SECONDS = 300.0
Trial = tuple[str, int, float | None]


@dataclass
class Place:
    """The folder of a tiny job: its settings, its run and the output of its commands.

    Args:
        folder: Empty, or not there yet.
        max_steps: Of the full run.
        trials: Short runs of the search.
        steps: Of a short run.
    """

    folder: Path
    max_steps: int = 16
    trials: int = 5
    steps: int = 8
    settings: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings = write_settings(self.folder)
        content = yaml.safe_load(self.settings.read_text(encoding="utf-8"))
        content["trainer"] |= {"max_steps": self.max_steps, "enable_progress_bar": False}
        content["tune"] = {"trials": self.trials, "steps": self.steps}
        self.settings.write_text(yaml.safe_dump(content), encoding="utf-8")

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "default" / "version_0"

    @property
    def last(self) -> Path:
        return self.run / "checkpoints" / "last.ckpt"

    @property
    def exported(self) -> Path:
        return self.folder / "exported"

    @property
    def said(self) -> str:
        return (self.folder / "output.txt").read_text(encoding="utf-8")

    @property
    def interval(self) -> int:
        """Steps between two checkpoints."""
        return max(1, self.max_steps // 8)

    def words(self, command: str) -> list[str]:
        if command == "export":
            return ["export", "--ckpt_path", str(self.last), "--output", str(self.exported)]
        return [command, "--config", str(self.settings), "--memory-budget", "24GB"]

    def start(self, command: str) -> ForkServerProcess:
        (self.folder / "step").unlink(missing_ok=True)
        process = SERVER.Process(target=_command, args=(self.folder, self.words(command)))
        process.start()
        return process

    def trials_done(self) -> set[Trial]:
        """List the finished trials of all stages, with their losses."""
        database = self.run / "tuning" / "study.db"
        if not database.exists():
            return set()
        url = f"sqlite:///{database}"
        return {
            (name, trial.number, trial.values[0] if trial.values else None)
            for name in optuna.get_all_study_names(url)
            for trial in optuna.load_study(study_name=name, storage=url).get_trials(states=FINISHED)
        }

    def summary(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.run / "summary.json").read_text())
        return content

    def steps_lost(self) -> int:
        """Count the steps of the last killed process after its checkpoint."""
        noted = self.folder / "step"
        return int(noted.read_text(encoding="utf-8")) - self.steps_kept() if noted.exists() else 0

    def steps_kept(self) -> int:
        """Return the step of the checkpoint that the run would resume from."""
        whole = find_intact_checkpoint(self.last)
        return whole.content["global_step"] if whole else 0

    def weights(self) -> dict[str, torch.Tensor]:
        content: dict[str, Any] = torch.load(self.last, weights_only=True)
        return dict(content["state_dict"])

    def leftovers(self) -> list[str]:
        """Return the temporary files."""
        return [path.name for path in self.folder.rglob("*") if ".part" in path.name]


def killed_after(process: ForkServerProcess, seconds: float) -> int | None:
    """Kill a process at a moment; return its exit code if it ended before."""
    process.join(seconds)
    code = process.exitcode
    process.kill()
    process.join()
    process.close()
    return code


def has_stepped(place: Place, process: ForkServerProcess) -> bool:
    """Wait for the first step of a run; return False if the process ended before."""
    while process.exitcode is None:
        if (place.folder / "step").exists():
            return True
        time.sleep(0.002)
    return False


def moments(seed: int) -> Callable[[float], float]:
    """Return a function that draws random moments below a limit."""
    source = random.Random(seed)
    return lambda most: source.uniform(0, most)


def load_modules() -> None:
    """Start the process that all others are forked from."""
    process = SERVER.Process(target=len, args=("",))
    process.start()
    process.join()
    process.close()


def timed(place: Place, command: str) -> float:
    """Run a command to its end, and return the seconds it took."""
    began = time.monotonic()
    code = killed_after(place.start(command), PATIENCE_SECONDS)
    assert code == 0, place.said
    return time.monotonic() - began


def _command(folder: Path, words: Sequence[str]) -> None:
    """Run a command in a process of its own."""
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)

    def note(_: Export, trainer: Trainer, *__: Any) -> None:
        """Write the number of finished steps to a file, which outlives a killed process."""
        following = folder / "step.next"
        following.write_text(str(trainer.global_step), encoding="utf-8")
        following.replace(folder / "step")

    with patch.object(Export, "on_train_batch_end", note):
        sys.exit(cli.main(list(words)))

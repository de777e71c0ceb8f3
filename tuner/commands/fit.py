"""The command `fit`: plan, tune, rehearse, train and export, then the final screen."""

import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.memory.device import calibrate
from foam_lightning.resume import load_given_plan, without_pretrained_folder
from foam_lightning.storage.atomic import write_text
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.units import format_bytes
from tuner.config.parser import Settings
from tuner.oom_fallback import load_fallback_options, memory_fallback
from tuner.pipeline import fit
from tuner.planning.planner import BudgetPlanner


def run_fit(settings: Settings) -> None:
    """Plan, tune, rehearse, train and export."""
    unfinished = find_unfinished(settings)
    starts = ([unfinished.last_checkpoint] if unfinished else []) + (
        [Path(settings.ckpt_path)] if settings.ckpt_path else []
    )
    job = without_pretrained_folder(settings.job(), starts)
    calibrate_gpu(job)
    planner = BudgetPlanner(job, settings.memory_budget or sys.maxsize)
    plan = load_given_plan(job, settings.ckpt_path, settings.fold_plan)
    memory_options = load_fallback_options(unfinished)
    if plan is None and settings.memory_budget is None:
        plan = job.own_plan()
    if plan is None and job.devices.count > 1:
        raise ConfigError(
            "tune in one process first: python cli.py tune with the same options, then fit "
            "--fold-plan FILE"
        )
    if plan is None:
        planner.check_feasible()
    else:
        plan = replace(plan, memory_options=memory_options or plan.memory_options)
        planner.check(plan)
    folder = open_folder(settings, job)
    with memory_fallback(planner, folder):
        summary = fit(
            job,
            planner,
            folder,
            settings.tune,
            plan=plan,
            memory_options=memory_options,
            settings=settings.text,
            ckpt_path=None if settings.ckpt_path is None else Path(settings.ckpt_path),
        )
    if summary is not None:
        print(final_screen(folder, summary))


def calibrate_gpu(job: Job) -> None:
    """Know what this machine's GPU costs, before anything is accounted."""
    if job.gpu is not None:
        calibrate(job.gpu)


def open_folder(settings: Settings, job: Job) -> RunFolder:
    """Open the run folder, once nothing that the user gave can still be wrong."""
    job.check_weights()
    job.new_trainer(job.memory_options, [], logger=False)
    job.new_data(job.memory_options).setup()
    folder = RunFolder.open(Path(settings.runs), settings.name, _identity(settings))
    if not folder.plan.exists():
        write_text(folder.config, settings.text)
    return folder


def find_unfinished(settings: Settings) -> RunFolder | None:
    """Find the run that the command continues, before anything is written."""
    return RunFolder.unfinished(Path(settings.runs), settings.name, _identity(settings))


def _identity(settings: Settings) -> str:
    """Give the text that tells one run from another."""
    start = settings.values.get("ckpt_path")
    return settings.text if start is None else f"{settings.text}ckpt_path: {start}\n"


def final_screen(folder: RunFolder, summary: Mapping[str, Any]) -> str:
    """Write the final screen of a run; its commands can be copied as they stand.

    Args:
        folder: Of the run.
        summary: The figures of `summary.json`.
    """
    return "\n".join(
        [
            *_rows("done", _figures(summary)),
            *_rows("where", {name: str(path) for name, path in _places(folder).items()}),
            *_rows("next", {name: shlex.join(words) for name, words in _commands(folder).items()}),
        ]
    )


def _figures(summary: Mapping[str, Any]) -> dict[str, str]:
    loss = summary["final_validation_loss"]
    found = {
        "validation": f"loss {loss:.4f} nats, perplexity {_exp(loss):.2f}, over "
        f"{summary['validation_tokens']} tokens"
    }
    if summary["measured_peak_bytes"] is not None:
        found["memory"] = f"peak {format_bytes(summary['measured_peak_bytes'])}"
        if summary["predicted_peak_bytes"] is not None:
            found["memory"] += f", {format_bytes(summary['predicted_peak_bytes'])} predicted"
    if summary["tokens_per_second"] is not None:
        found["speed"] = f"{summary['tokens_per_second']:.0f} tokens/s"
    if summary.get("skipped_steps"):
        found["skipped"] = (
            f"{summary['skipped_steps']} steps with bad numbers, {summary['rollbacks']} rollbacks"
        )
    return found


def _places(folder: RunFolder) -> dict[str, Path]:
    """Name what there is; a run by a given plan has no report."""
    places = {
        "run folder": folder.path,
        "plan": folder.plan,
        "report": folder.tuning / "report.md",
        "figures": folder.summary,
        "checkpoint": folder.last_checkpoint,
        "Hugging Face": folder.hf,
    }
    return {name: path for name, path in places.items() if path.exists()}


def _commands(folder: RunFolder) -> dict[str, list[str]]:
    checkpoint = ["--ckpt_path", str(folder.last_checkpoint)]
    return {
        # Above the versions of the run, which are then compared under HPARAMS.
        "look": ["tensorboard", "--logdir", str(folder.path.parent)],
        "evaluate": [*_program(), "validate", *checkpoint],
        "write text": [*_program(), "generate", *checkpoint, "--prompt", "def "],
    }


def _program() -> list[str]:
    """Tell how this program is called here: as a script, or by the name it is installed under."""
    called = Path(sys.argv[0])
    if called.name == "foam":
        return ["foam"]
    return ["python", str(called) if called.name == "cli.py" else "cli.py"]


def _rows(title: str, rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [title, *(f"  {name:<{width}}  {text}" for name, text in rows.items())]


def _exp(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)

"""The final screen of a run: its results, its files, and the commands to run next."""

import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.units import format_bytes_apart


def final_screen(folder: RunFolder, summary: Mapping[str, Any]) -> str:
    """Write the final screen; its commands can be copied as they stand.

    Args:
        folder: The folder of the run.
        summary: The content of `summary.json`.
    """
    commands = {name: shlex.join(words) for name, words in _commands(folder).items()}
    title = "done" if summary.get("is_finished", True) else "stopped"
    sections = {title: _results(summary), "files": _files(folder), "next": commands}
    lines = []
    for title, rows in sections.items():
        width = max(map(len, rows))
        lines += [title, *(f"  {name:<{width}}  {text}" for name, text in rows.items())]
    return "\n".join(lines)


def _results(summary: Mapping[str, Any]) -> dict[str, str]:
    loss = summary["final_validation_loss"]
    perplexity = math.inf if loss > 700 else math.exp(loss)
    found = {
        "validation": f"loss {loss:.4f} nats per token, perplexity {perplexity:.2f} "
        f"({summary['validation_tokens']} tokens)"
    }
    if summary.get("ended_by") is not None:
        found["ended"] = _end(summary)
    measured, predicted = summary["measured_peak_bytes"], summary["predicted_peak_bytes"]
    if measured is not None:
        texts = format_bytes_apart(*(n for n in (measured, predicted) if n is not None))
        labels = ("measured", "predicted")
        found["memory"] = "peak " + ", ".join(map(" ".join, zip(texts, labels, strict=False)))
    if summary["tokens_per_second"] is not None:
        found["speed"] = f"{summary['tokens_per_second']:.0f} tokens/s"
    if summary.get("skipped_steps"):
        found["skipped"] = (
            f"{summary['skipped_steps']} steps with bad losses or gradients, "
            f"{summary['rollbacks']} rollbacks"
        )
    return found


def _end(summary: Mapping[str, Any]) -> str:
    step, last = summary["steps"], summary["max_steps"]
    text = f"by {summary['ended_by']} at step {step} of {last}"
    if summary["is_finished"]:
        return text
    return f"{text}; {last - step} steps are left, and the same command goes on"


def _files(folder: RunFolder) -> dict[str, str]:
    """List the files that exist; a run by a given plan has no report."""
    paths = {
        "run folder": folder.path,
        "plan": folder.plan,
        "report": folder.tuning / "report.md",
        "summary": folder.summary,
        "checkpoint": folder.last_checkpoint,
        "Hugging Face": folder.hf,
    }
    return {name: str(path) for name, path in paths.items() if path.exists()}


def _commands(folder: RunFolder) -> dict[str, list[str]]:
    checkpoint = ["--ckpt_path", str(folder.last_checkpoint)]
    return {
        # Above the versions of the run, which TensorBoard then compares under HPARAMS.
        "watch": ["tensorboard", "--logdir", str(folder.path.parent)],
        "evaluate": [*_program(), "validate", *checkpoint],
        "generate": [*_program(), "generate", *checkpoint, "--prompt", "def "],
    }


def _program() -> list[str]:
    """Return how this program was called: as a script, or by the name it is installed under."""
    called = Path(sys.argv[0])
    if called.name == "foam":
        return ["foam"]
    return ["python", str(called) if called.name == "cli.py" else "cli.py"]

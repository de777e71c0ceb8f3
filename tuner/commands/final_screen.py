"""What a finished run says last: where everything is, and what to type next."""

import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.units import in_words


def ending(folder: RunFolder, summary: Mapping[str, Any]) -> str:
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
        found["memory"] = f"peak {in_words(summary['measured_peak_bytes'])}"
        if summary["predicted_peak_bytes"] is not None:
            found["memory"] += f", {in_words(summary['predicted_peak_bytes'])} predicted"
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

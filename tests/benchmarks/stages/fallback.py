"""A `fit` that runs out of memory, falls back, starts afresh and resumes."""

import shutil
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path

import yaml

from foam_lightning.units import format_bytes
from tests.benchmarks.heading import ROOT
from tests.benchmarks.stages.record import Record, Setting
from tests.support.fallback_case import FallbackCase

MODEL, BATCH, STEPS = "llama_60m", 64, 16


def run_out_of_memory(setting: Setting) -> None:
    """Run `fit` in a process that gets less than it needs from its first checkpoint on."""
    record = setting.record
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if setting.tiny:
            case = FallbackCase(folder)
        else:
            case = FallbackCase(folder, settings=_write_settings(folder, setting))
        own, second = (case.peak(options) for options in case.options_in_order(2))
        # The limit of the process is on what torch reserves; the account has the context, too.
        limit = case.limit - (case.planner.accountant.context if setting.on_gpu else 0)
        record.note(
            f"Predicted: {format_bytes(own)} by its own plan, {format_bytes(second)} by the first "
            f"fall-back; from the first checkpoint on the process gets {format_bytes(case.limit)}."
        )
        process = case.start(limit, *(["--gpu"] if setting.on_gpu else []))
        try:
            output, _ = process.communicate(timeout=max(1.0, setting.seconds_left() - 5))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        print(output)
        _report(record, case, process.returncode, output)
        shutil.rmtree(case.folder, ignore_errors=True)


def _report(record: Record, case: FallbackCase, code: int | None, output: str) -> None:
    if (case.folder / "fallback.json").exists():
        for number, event in enumerate(case.fallback()["events"], start=1):
            changed = asdict(case.plan.memory_options) if number == 1 else event["from"]
            record.row(
                f"fall-back {number}",
                after_step=event["step"],
                predicted_bytes=event["predicted_peak_bytes"],
                used_bytes=event["taken_bytes"],
                what=event["reason"],
                change=", ".join(
                    f"{key} {value}" for key, value in event["to"].items() if value != changed[key]
                ),
            )
    else:
        record.row("fall-back", failure="memory did not run out")
    if code != 0 or not (case.folder / "summary.json").exists():
        told = output.strip().splitlines() or ["no output"]
        record.row("resumed run", failure=f"exit code {code}: {told[-1]}"[:300])
        return
    summary = case.summary()
    done = (
        f"done after {summary['fallbacks']} fall-backs, validation loss "
        f"{summary['final_validation_loss']:.4f}"
    )
    record.row(
        "resumed run",
        predicted_bytes=summary["predicted_peak_bytes"],
        used_bytes=summary["measured_peak_bytes"],
        what=done,
    )
    record.note(f"The run was {done}.")


def _write_settings(folder: Path, setting: Setting) -> Path:
    """Write the configuration of a short run of MODEL that stays within the folder."""
    path = ROOT / "configs" / f"{MODEL}.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings["name"] = "default"
    settings["data"] = {
        "sequence_length": settings["data"]["sequence_length"],
        "batch_size": BATCH,
        "validation_sequences": BATCH,
        "cache_dir": str(folder / "cache"),
    }
    if files := setting.text_files(".txt", ".jsonl", ".parquet"):
        settings["data"]["files"] = [str(file) for file in files]
    settings["trainer"] |= {
        "accelerator": setting.device,
        "devices": 1,
        "max_steps": STEPS,
        "val_check_interval": STEPS // 2,
        "log_every_n_steps": 1,
    }
    settings["runs"] = str(folder / "runs")
    written = folder / "settings.yaml"
    written.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return written

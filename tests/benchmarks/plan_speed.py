"""Measure the time and memory that `plan` needs, for models of 7B and of 70B parameters.

    python -m tests.benchmarks.plan_speed [--output FILE]

Each row is one run of the command in a new process, imports included.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from foam_lightning.units import format_bytes
from tests.benchmarks.heading import ROOT, commit_and_date, packages, processor, publish

_7B = ("--config", "configs/llama_7b.yaml")
_70B = (
    *_7B,
    *("--model.num_hidden_layers", "80"),
    *("--model.hidden_size", "8192"),
    *("--model.intermediate_size", "28672"),
    *("--model.num_attention_heads", "64"),
    *("--model.num_key_value_heads", "8"),
)
_LARGE_VOCABULARY = ("--model.vocab_size", "128256")
_FEW_ROWS = ("--data.batch_size", "4")
_INFEASIBLE = 3  # the exit code
CASES: dict[str, tuple[str, ...]] = {
    "7B, 512 sequences, 24GB": (*_7B, "--memory-budget", "24GB"),
    "7B, 512 sequences, 40GB": (*_7B, "--memory-budget", "40GB"),
    "7B, 4 sequences, 24GB": (*_7B, *_FEW_ROWS, "--memory-budget", "24GB"),
    "70B, 512 sequences, 400GB": (*_70B, "--memory-budget", "400GB"),
    "70B, 512 sequences, 100GB": (*_70B, "--memory-budget", "100GB"),
    "70B, vocabulary 128256, 4 sequences, 180GB": (
        *(*_70B, *_LARGE_VOCABULARY, *_FEW_ROWS),
        *("--memory-budget", "180GB"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    lines = [
        "# How long a plan takes",
        "",
        f"- command: `python -m tests.benchmarks.plan_speed {' '.join(sys.argv[1:])}`".rstrip(),
        f"- {commit_and_date()}, no seed involved",
        f"- {processor()}, {os.cpu_count()} cores, {platform.system()}; load average at the start "
        f"{os.getloadavg()[0]:.1f}, so wall time may hold waiting for others",
        f"- {packages('torch', 'lightning', 'transformers', 'numpy')}",
        "- 70B: 80 layers, hidden 8192, intermediate 28672, 64 heads, 8 of them for keys and "
        "values; all else as in `configs/llama_7b.yaml`",
        "- resident memory is the peak of the process; the first row only imports",
        "",
        "| job | wall s | user s | resident | feasible | mean level |",
        "|---|---|---|---|---|---|",
    ]
    wall, user, resident, _, _ = _run("-c", "import gc; gc.disable(); import tuner.config.parser")
    lines.append(f"| imports alone | {wall:.1f} | {user:.1f} | {format_bytes(resident)} | | |")
    for name, options in CASES.items():
        lines.append(_row(name, options))
        print(lines[-1], file=sys.stderr, flush=True)
    publish(lines, arguments.output)


def _row(name: str, options: tuple[str, ...]) -> str:
    wall, user, resident, code, text = _run("cli.py", "plan", "--format", "json", *options)
    if code not in (0, _INFEASIBLE):
        raise SystemExit(f"{name}: plan ended with exit code {code}")
    plan = json.loads(text)
    levels = list(plan["levels"].values())
    feasible = (
        "yes" if plan["feasible"] else f"no, needs {format_bytes(plan['minimum_budget_bytes'])}"
    )
    return (
        f"| {name} | {wall:.1f} | {user:.1f} | {format_bytes(resident)} | {feasible} | "
        f"{sum(levels) / len(levels):.2f} |"
    )


def _run(*words: str) -> tuple[float, float, int, int, str]:
    """Run Python; return wall and user seconds, peak resident bytes, exit code and output."""
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8") as output:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=output)
        # Unlike getrusage, this counts one child alone.
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        # Linux counts in KiB.
        return wall, usage.ru_utime, usage.ru_maxrss * 1024, process.returncode, output.read()


if __name__ == "__main__":
    main()

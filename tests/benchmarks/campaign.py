"""Everything that a GPU can prove or refute, in one command: a page, and its rows as they come.

    python -m tests.benchmarks.campaign --output FOLDER
    python -m tests.benchmarks.campaign --call a --output FOLDER
    python -m tests.benchmarks.campaign --call b --continue FOLDER --output ANOTHER
    python -m tests.benchmarks.campaign --device cpu --tiny --output FOLDER
    python -m tests.benchmarks.campaign --page FOLDER

Each stage has a process of its own and a time limit; one that fails or hangs stops no other. In
FOLDER are results.jsonl, with a line for each result as soon as it is there, page.md, made of these
lines, log.txt and plots. Nothing else is written but temporary files. docs/gpu.md tells more.
"""

import argparse
import datetime
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from foam_lightning.memory.allocator import set_expandable_segments
from tests.benchmarks.commit import read_commit
from tests.benchmarks.fresh_process import in_fresh_process
from tests.benchmarks.stages.process import Ending, new_context, run_stage
from tests.benchmarks.stages.record import (
    LOG,
    RESULTS,
    Line,
    Record,
    Setting,
    append,
    read_lines,
)

CALL_SECONDS = {"a": 540, "b": 240}
_CLOSING_SECONDS = 8  # for the last page and its plots
_PLOT_SECONDS = 20
_TINY_PATIENCE = 4  # a CPU may be shared


@dataclass(frozen=True)
class Stage:
    """A part of the campaign.

    Attributes:
        name: As in `--only`.
        title: What it shows.
        function: "module:function", which takes a `Setting`.
        seconds: Its limit.
        least_seconds: With less time left it is not begun.
        call: The call that it belongs to.
    """

    name: str
    title: str
    function: str
    seconds: float
    least_seconds: float
    call: str = "a"


_STAGES = "tests.benchmarks.stages"
_CHECKS, _BUDGET, _MEASURES = f"{_STAGES}.checks", f"{_STAGES}.budget", f"{_STAGES}.measures"
STAGES = (
    Stage("versions", "what is installed, and the card", f"{_CHECKS}:check_versions", 40, 5),
    Stage("gpu_tests", "the tests that need a GPU", f"{_CHECKS}:run_gpu_tests", 100, 10),
    Stage("kernel", "fused and plain updates agree", f"{_STAGES}.kernel:compare_updates", 60, 10),
    Stage("llama_7b", "LLaMA 7B in a hard 24 GB", f"{_BUDGET}:train_llama_7b", 130, 40),
    Stage("llama3_8b", "Llama 3 8B in a hard 24 GB", f"{_BUDGET}:train_llama3_8b", 90, 40),
    Stage("optimizer_step", "the optimizer step", f"{_MEASURES}:time_optimizer_steps", 80, 25),
    Stage("fallback", "fit runs out of memory", f"{_STAGES}.fallback:run_out_of_memory", 90, 25),
    Stage("memory", "predicted and measured peaks", f"{_MEASURES}:measure_memory", 100, 20),
    Stage("training", "FOAM beside Adam", f"{_STAGES}.training:train_60m", 200, 25, "b"),
)
NAMES = [stage.name for stage in STAGES]


def main(words: Sequence[str]) -> int:
    options = parse(words)
    if options.page is not None:
        return _make_page(options.page)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        # Caches, calibration and runs; a card and its torch are measured afresh.
        places = {"TMPDIR": temporary, "XDG_CACHE_HOME": f"{temporary}/cache"}
        with patch.dict(os.environ, {**places, "HF_HUB_OFFLINE": "1"}):
            set_expandable_segments()
            return _run_all(options, words)


def _run_all(options: argparse.Namespace, words: Sequence[str]) -> int:
    end = time.monotonic() + options.seconds - _CLOSING_SECONDS
    folder: Path = options.output
    earlier = read_lines(options.earlier) if options.earlier else []
    context, failure = new_context(options.device)
    if failure is not None:
        print(
            f"error: torch can use no GPU ({failure}); --device cuda needs one, and --device cpu "
            "--tiny runs everything without",
            file=sys.stderr,
        )
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    for line in _keep(earlier):
        append(folder, line)
    now = datetime.datetime.now(tz=datetime.UTC)
    command = shlex.join(["python", "-m", "tests.benchmarks.campaign", *words])
    heading = {"campaign": command, "commit": f"commit {options.commit or read_commit()}"}
    heading |= {"when": f"{now:%Y-%m-%d %H:%M} UTC", "device": options.device}
    append(folder, {**heading, "tiny": options.tiny})
    endings = [_run(context, stage, options, end) for stage in _choose(options, earlier)]
    for stage, ending in endings:
        print(f"{stage.name}: {ending.result}, {ending.seconds:.0f} s", file=sys.stderr)
    print(folder / "page.md")
    return 0 if all(ending.result == "done" for _, ending in endings) else 1


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="new or empty")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="seconds a stage on a CPU")
    parser.add_argument("--call", choices=CALL_SECONDS, help="half of the stages; b trains on text")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=float, help="in all; later stages get less, or none")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help=".txt, .jsonl, .parquet, .npy")
    parser.add_argument("--continue", dest="earlier", type=Path, metavar="FOLDER")
    parser.add_argument("--commit", help="of the code, where there is no repository")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="make the page again, no more")
    options = parser.parse_args(words)
    if options.seconds is None:
        options.seconds = CALL_SECONDS.get(options.call, sum(CALL_SECONDS.values()))
    for folder in (options.text, options.earlier, options.page):
        if folder is not None and not folder.is_dir():
            parser.error(f"there is no folder {folder}")
    if options.page is not None:
        return options
    if options.output is None:
        parser.error("--output FOLDER is missing")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: the models are too large for a CPU")
    if (options.output / RESULTS).exists():
        parser.error(
            f"{options.output} has results; give another --output, and to go on with them also "
            f"--continue {options.output}"
        )
    return options


def _keep(lines: Sequence[Line]) -> list[Line]:
    """Select what an earlier campaign has finished: all of whole stages, the rows of others."""
    done = {line["stage"] for line in lines if line.get("end") == "done"}
    return [
        line
        for line in lines
        if "campaign" in line
        or line["stage"] in done
        or ("row" in line and "failure" not in line["values"])
    ]


def _choose(options: argparse.Namespace, earlier: Sequence[Line]) -> list[Stage]:
    """Choose the stages to run, those of the call first, then what an earlier one lacks."""
    done = {line["stage"] for line in earlier if line.get("end") == "done"}
    stages = [stage for stage in STAGES if stage.name not in done]
    if options.only:
        return [stage for stage in stages if stage.name in options.only]
    if options.call is None:
        return stages
    own = [stage for stage in stages if stage.call == options.call]
    return own + [stage for stage in stages if options.earlier and stage not in own]


def _run(context: Any, stage: Stage, options: argparse.Namespace, end: float) -> Any:
    """Run a stage in the time that is left, and write down how it ended."""
    folder = options.output
    left = end - time.monotonic()
    append(folder, {"stage": stage.name, "begin": stage.title})
    if left < stage.least_seconds:
        ending = Ending("not run, no time left", 0.0)
    else:
        setting = Setting(
            device=options.device,
            tiny=options.tiny,
            text=options.text,
            record=Record(folder, stage.name),
            end=time.monotonic()
            + min(left, stage.seconds * (_TINY_PATIENCE if options.tiny else 1)),
        )
        ending = run_stage(context, stage.function, setting)
    line = {"stage": stage.name, "end": ending.result, "seconds": round(ending.seconds, 2)}
    append(folder, line if ending.error is None else {**line, "error": ending.error})
    if ending.result != "not run, no time left":
        # Without a stage's plots, if the rest of the time is too short for them.
        _draw(context, folder, min(_PLOT_SECONDS, end + _CLOSING_SECONDS - 2 - time.monotonic()))
    return stage, ending


def _draw(context: Any, folder: Path, seconds: float) -> None:
    """Draw the plots, and make the page show them; in a process, which may fail or hang."""
    _, failure = in_fresh_process(context, seconds, _redraw, folder)
    if failure:
        with (folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"plots: {failure}\n")


def _redraw(folder: Path) -> None:
    from tests.benchmarks.stages.page import draw_plots, write_page

    draw_plots(folder)
    write_page(folder, read_lines(folder))


def _make_page(folder: Path) -> int:
    if not read_lines(folder):
        print(f"error: {folder} has no lines in {RESULTS}", file=sys.stderr)
        return 2
    _redraw(folder)
    print(folder / "page.md")
    return 0


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, lambda number, _: sys.exit(128 + number))
    sys.exit(main(sys.argv[1:]))

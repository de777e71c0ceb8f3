"""Mutated plans, sizes, configurations and command lines: each is read, or refused in one line.

    python -m tests.benchmarks.fuzz [--seed N] [--output FILE]

Valid inputs and hostile fragments are cut, joined and changed at random. An input that reaches a
line of our own code that none reached before is kept and mutated further (coverage as the guide).
A finding is anything but our own one-line error: another exception, a message of several lines, an
import that a configuration asked for, more than 5 seconds, or 500 MB more of memory.
"""

import argparse
import contextlib
import io
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from foam_lightning.errors import FoamError, one_line
from foam_lightning.plan import FoldPlan, MemoryOptions
from foam_lightning.units import ByteSize
from tests.benchmarks.heading import ROOT, commit_and_date, machine, packages, publish
from tuner.config import parser as settings
from tuner.config.early_checks import check_command_line

MOST_SECONDS = 5
MOST_KILOBYTES = 500_000
HOSTILE_MODULE = "antigravity"  # of Python's library; importing it shows that code would run
_NAMES = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)]
_PLAN = FoldPlan(
    model={"hidden_size": 32, "tie_word_embeddings": False},
    levels=dict.fromkeys(_NAMES, 2),
    scales=dict.fromkeys(_NAMES, 0.25),
    lr=0.01,
    memory_options=MemoryOptions(micro_batch_size=4),
).to_json()
_FIRST_SCHEMA = json.dumps(
    {**json.loads(_PLAN), "schema": "foam-lightning/fold-plan/1", "scales": {"2": 0.25}}
)
_CONFIGS = [
    path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    if path.name in ("default.yaml", "c4.yaml", "finetune.yaml")
] + [
    "model: &m {lr: 0.1}\ntrainer: {max_steps: 5}\ndata: {files: [a.txt, b.txt]}\n",
    "data:\n  sources:\n  - {files: [a.txt], weight: 3}\n  - {dataset: a/b, weight: 1}\n"
    "trainer: {max_steps: 5}\n",
    "trainer:\n  max_steps: 5\n  callbacks:\n  - class_path: EarlyStopping\n    init_args: "
    "{monitor: validation/loss}\n",
]
_LINES = [
    "--trainer.max_steps 5 --model.level 2 --memory-budget 24GB",
    "--data.files a.txt b.txt --data.batch_size 8 --name run --seed_everything 3",
    "--config configs/default.yaml --model.betas [0.9,0.99] --model.clip_norm null",
    "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor x --trainer.devices 0,1",
    '--data.sources [{"files":["a.txt"],"weight":1}] --allow-class-paths tests',
]
_FRAGMENTS = [
    *("0", "-1", "1e400", ".nan", ".inf", "NaN", "Infinity", "null", "true", "~", "''", '"', "'"),
    *("9" * 30, "1" * 5000, "0.1", "1e-9", "0x1f", "0o17", "1_000", "٢", "²", "\u2028", "\0"),
    *("{", "}", "[", "]", ":", ": ", ",", "- ", "\n", "\t", "&a ", "*a", "<<: *a"),
    *("!!python/name:os", "!!binary ", "!!set ", "!!timestamp ", "%YAML 1.1\n", "---\n", "...\n"),
    *("? ", "| ", "> ", "#"),
    *("class_path: ", "init_args: ", f"{HOSTILE_MODULE}.x", "os.system", "EarlyStopping"),
    *("[" * 50, "[" * 3000, "{a: " * 50, "&a [*a, *a]", "2020-99-99", "\ud800", "é", "\ufeff"),
    *("--model.", "--trainer.", "--data.", "--tune.", "=", "--", " ", "+=", ".help"),
    *("GB", "GiB", "kB", "TiB", "B", " ", "e", ".", "https://me:secret@host/", "${oc.env:HOME}"),
    *("levels", "scales", "memory_options", "model", "data", "trainer", "lr", "schema"),
    "proxy_model",
]  # fmt: skip


# ---- what is tried


def read_plan(text: str) -> None:
    """Read a plan."""
    FoldPlan.from_json(text)


def read_size(text: str) -> None:
    """Read a size, which is to come back from its own text."""
    try:
        size = ByteSize(text)
    except ValueError as error:  # the command line puts the name of the option before it
        raise FoamError(str(error)) from error
    assert ByteSize(str(size)) == size > 0


def read_config(text: str) -> None:
    """Read a configuration file as `plan` does, up to the module that it describes."""
    with tempfile.NamedTemporaryFile("wb", suffix=".yaml") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        file.flush()
        _answer(["--config", file.name], None)


def read_words(text: str) -> None:
    """Read what may be typed after `plan`."""
    _answer(text.split(" "), ROOT / "configs" / "default.yaml")


def _answer(options: list[str], default: Path | None) -> None:
    try:
        check_command_line("plan", options)
        settings.parse("plan", options, default=default).job().new_module()
    except FoamError as error:
        raise FoamError(one_line(error)) from error  # as the command line prints it


TARGETS: dict[str, tuple[Callable[[str], None], Sequence[str]]] = {
    "plans": (read_plan, [_PLAN, _FIRST_SCHEMA]),
    "sizes": (read_size, ["24GB", "22.5GiB", "1B", "0.5 TiB", " 100 kB "]),
    "configurations": (read_config, _CONFIGS),
    "command lines": (read_words, _LINES),
}


# What is quick to try needs less of the time.
_SHARES = {"plans": 0.1, "sizes": 0.1, "configurations": 0.4, "command lines": 0.4}


# ---- how


@dataclass
class Found:
    """What came of one target.

    Attributes:
        runs: Inputs tried.
        read: How many were read; the others were refused.
        corpus: Inputs worth mutating further.
        lines: Lines of our code that were reached.
        findings: Inputs by what is wrong with the answer; one input for each.
        slowest: Seconds of the slowest input.
    """

    runs: int = 0
    read: int = 0
    corpus: list[str] = field(default_factory=list)
    lines: set[tuple[str, int]] = field(default_factory=set)
    findings: dict[str, str] = field(default_factory=dict)
    slowest: float = 0.0


def fuzz(name: str, stops: Callable[[Found], bool], *, seed: int, guided: bool = True) -> Found:
    """Try mutated inputs until `stops` says so.

    Args:
        name: Of `TARGETS`.
        stops: Asked after every input.
        seed: Of the mutations.
        guided: Keep what reaches new lines; tracing takes time.
    """
    target, seeds = TARGETS[name]
    draw = random.Random(seed)
    found = Found(corpus=list(seeds))
    with parser_made_once(), contextlib.redirect_stdout(io.StringIO()):
        while not stops(found):
            is_seed = found.runs < len(seeds)
            text = seeds[found.runs] if is_seed else mutated(draw, found.corpus)
            _try(target, text, found, guided=guided)
    return found


@contextlib.contextmanager
def parser_made_once() -> Iterator[None]:
    """Keep the parser from one input to the next: making it takes longer than using it."""
    before = settings.make_parser
    settings.make_parser = cache(before)
    try:
        yield
    finally:
        settings.make_parser = before


def mutated(draw: random.Random, corpus: Sequence[str]) -> str:
    """Change an input in a few places, or join it with another."""
    text = draw.choice(corpus)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        start, stop = sorted(draw.choices(range(len(text) + 1), k=2))
        stop = min(stop, start + draw.choice((0, 1, 2, 10, 1000)))
        kind = draw.randrange(5)
        if kind == 0:
            text = text[:start] + text[stop:]
        elif kind == 1:
            text = text[:start] + draw.choice(_FRAGMENTS) + text[stop:]
        elif kind == 2:
            text = text[:stop] + text[start:stop] * draw.choice((1, 1, 2, 30)) + text[stop:]
        elif kind == 3:
            other = draw.choice(corpus)
            cut = draw.randrange(len(other) + 1)
            text = text[:start] + other[cut : cut + draw.choice((1, 5, 20, 500))] + text[stop:]
        else:
            text = text[:start] + chr(draw.choice((draw.randrange(128), draw.randrange(0xD7FF))))
            text += draw.choice(corpus)[start + 1 :]
    return text[:20_000]


def _try(target: Callable[[str], None], text: str, found: Found, *, guided: bool) -> None:
    lines: set[tuple[str, int]] = set()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    wrong = None
    before = signal.signal(signal.SIGALRM, _late)
    signal.alarm(MOST_SECONDS)
    try:
        with _tracing(lines) if guided else contextlib.nullcontext():
            target(text)
        found.read += 1
    except FoamError as error:
        message = str(error)
        if "\n" in message or len(message) > 2000 or not message:
            wrong = f"a message of {message.count(chr(10)) + 1} lines, {len(message)} characters"
    except SystemExit as error:  # .help and --print_config answer and end
        wrong = f"exit {error.code}" if error.code else None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        wrong = f"{type(error).__name__}: {str(error)[:100]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    found.slowest = max(found.slowest, time.monotonic() - start)
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory > MOST_KILOBYTES:
        wrong = wrong or "more than 500 MB"
    if sys.modules.pop(HOSTILE_MODULE, None) is not None:
        wrong = "an import that the input asked for"
    if wrong is not None:
        found.findings.setdefault(wrong, text)
    elif not lines <= found.lines:
        found.corpus.append(text)
    found.lines |= lines
    found.runs += 1


def _late(*_: Any) -> None:
    raise TimeoutError(f"more than {MOST_SECONDS} seconds")


@contextlib.contextmanager
def _tracing(lines: set[tuple[str, int]]) -> Iterator[None]:
    def in_frame(frame: FrameType, event: str, _: Any) -> Any:
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        return in_frame

    def on_call(frame: FrameType, _event: str, _: Any) -> Any:
        return in_frame if _is_ours(frame.f_code.co_filename) else None

    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(None)


@cache
def _is_ours(file: str) -> bool:
    return file.startswith((str(ROOT / "foam_lightning"), str(ROOT / "tuner")))


# ---- the page


def _page(results: dict[str, Found], command: str, seconds: float, seed: int) -> Iterator[str]:
    yield "# Fuzzing what reads plans, sizes, configurations and command lines"
    yield ""
    yield f"- command: `{command}`"
    yield f"- {commit_and_date()}, seed {seed}, {seconds / 60:.1f} minutes"
    yield f"- {machine()}"
    yield f"- {packages('jsonargparse', 'PyYAML', 'lightning')}"
    yield ""
    yield "| input | tried | read | kept as new | lines reached | slowest, s | findings |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, found in results.items():
        kept = len(found.corpus) - len(TARGETS[name][1])
        yield (
            f"| {name} | {found.runs} | {found.read} | {kept} | {len(found.lines)} | "
            f"{found.slowest:.2f} | {len(found.findings)} |"
        )
    yield ""
    yield (
        "An input is read, or refused by one line of ours; everything else is a finding: another "
        "exception, a message of several lines, an import that the input asked for, more than "
        f"{MOST_SECONDS} seconds, or 500 MB more of memory. Inputs that reach new lines of our "
        "code are mutated further."
    )
    for name, found in results.items():
        for wrong, text in found.findings.items():
            yield ""
            yield f"- {name}: {wrong}: `{text[:300]!r}`"


def main() -> None:
    """Fuzz every target for its share of the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    start = until = time.monotonic()
    results = {}
    for name in TARGETS:
        until += options.minutes * 60 * _SHARES[name]
        results[name] = fuzz(name, lambda _: time.monotonic() > until, seed=options.seed)  # noqa: B023
        print(name, Counter(found=len(results[name].findings), runs=results[name].runs))
    words = f"python -m tests.benchmarks.fuzz --minutes {options.minutes:g} --seed {options.seed}"
    publish(_page(results, words, time.monotonic() - start, options.seed), options.output)


if __name__ == "__main__":
    main()

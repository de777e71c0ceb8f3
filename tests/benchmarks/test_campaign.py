"""The campaign at its smallest, and that neither a stage nor a kill takes its results away."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.benchmarks import campaign
from tests.benchmarks.campaign import NAMES, STAGES, Stage, main
from tests.benchmarks.stages.checks import free_before_context
from tests.benchmarks.stages.page import rows_of
from tests.benchmarks.stages.record import Record, Setting, append, read_lines
from tests.benchmarks.stages.training import read_tokens
from tests.support.tiny import REPOSITORY

TINY = ["--device", "cpu", "--tiny"]


def start(*words: str | Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.campaign", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def results(folder: Path) -> dict[str, str]:
    return {line["stage"]: line["end"] for line in read_lines(folder) if "end" in line}


def rows(folder: Path, stage: str) -> dict[str, dict[str, Any]]:
    return rows_of([line for line in read_lines(folder) if line.get("stage") == stage])


def rows_on_page(folder: Path) -> set[str]:
    page = (folder / "page.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| ([^|]*?) \|", page, flags=re.MULTILINE))


@pytest.mark.slow
def test_every_stage_of_a_tiny_campaign_is_done(tmp_path: Path) -> None:
    process = start(*TINY, "--output", tmp_path / "out")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    folder = tmp_path / "out"
    assert results(folder) == dict.fromkeys(NAMES, "done")
    failures = {
        name: [row for row, values in rows(folder, name).items() if "failure" in values]
        for name in NAMES
    }
    assert failures == {name: [] for name in NAMES}
    for name in ("llama_7b", "llama3_8b"):
        steps = list(rows(folder, name).values())
        assert len(steps) == 20
        assert steps[-1]["loss"] < steps[0]["loss"]
        assert all(step["peak_bytes"] <= step["budget_bytes"] for step in steps)
        assert steps[-1]["predicted_bytes"] == pytest.approx(steps[-1]["peak_bytes"], rel=0.01)
    assert all(0.999 <= row["ratio"] <= 1.01 for row in rows(folder, "memory").values())
    assert all(row["result"] != "DIFFERENT" for row in rows(folder, "kernel").values())
    assert {"fall-back 1", "resumed run"} == set(rows(folder, "fallback"))
    assert all("bound_seconds" in row for row in rows(folder, "optimizer_step").values())
    assert len(rows(folder, "training")) == 4
    files = {path.name for path in folder.iterdir()}
    pictures = {"llama_7b.png", "llama3_8b.png", "optimizer_step.png"}
    assert files == {"results.jsonl", "page.md", "log.txt", *pictures}  # at most 8
    shown = (folder / "page.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in shown for name in pictures)


@pytest.mark.slow
def test_a_campaign_killed_at_any_moment_leaves_its_rows_and_can_go_on(tmp_path: Path) -> None:
    folder, second = tmp_path / "out", tmp_path / "second"
    process = start(*TINY, "--only", "kernel", "llama_7b", "--output", folder)
    while len(read_lines(folder)) < 4 and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.SystemRandom().uniform(0, 1.5))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(0.5)  # the stage notices
    lines = read_lines(folder)
    found = {line["row"] for line in lines if "row" in line}
    assert found
    assert found <= rows_on_page(folder)
    time.sleep(0.5)
    assert read_lines(folder) == lines  # nothing lives on

    assert main(["--page", str(folder)]) == 0
    assert found <= rows_on_page(folder)
    words = [*TINY, "--only", "kernel", "--continue", str(folder), "--output", str(second)]
    assert main(words) == 0
    assert results(second)["kernel"] == "done"
    before, after = rows(folder, "kernel"), rows(second, "kernel")
    assert len(after) == 36
    assert {name: after[name] for name in before} == before  # not measured again


def fail(setting: Setting) -> None:
    setting.record.row("first", value=1)
    raise ValueError("the last line of the error")


def hang(setting: Setting) -> None:
    setting.record.row("first", value=2)
    subprocess.Popen(["sleep", "300"])
    time.sleep(300)


def succeed(setting: Setting) -> None:
    for name in setting.missing(["first", "second"]):
        setting.record.row(name, seen_bytes=3 * 10**6, text="a | b")


@pytest.mark.slow
def test_stages_that_fail_hang_or_come_too_late_stop_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [
        Stage(function.__name__, "", f"{__name__}:{function.__name__}", seconds, 0)
        for function, seconds in ((fail, 60), (hang, 5), (succeed, 60))
    ]
    late = Stage("late", "", f"{__name__}:succeed", 60, 10**6)
    monkeypatch.setattr(campaign, "STAGES", (*stages, late))
    assert main([*TINY, "--output", str(tmp_path / "out")]) == 1
    folder = tmp_path / "out"
    assert results(folder) == {
        "fail": "failed",
        "hang": "timed out",
        "succeed": "done",
        "late": "not run, no time left",
    }
    assert rows(folder, "hang") == {"first": {"value": 2}}
    page = (folder / "page.md").read_text(encoding="utf-8")
    assert "ValueError: the last line of the error" in page
    assert "in hang" in page  # where it was
    assert "| second | 3 MB | a / b |" in page
    assert "sleep" not in processes()
    assert "late: not run" in capsys.readouterr().err


def processes() -> set[str]:
    """Name what still runs below a stage of this test."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[:2] == [b"sleep", b"300"]:
            found.add("sleep")
    return found


def test_what_an_earlier_campaign_finished_is_kept_and_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, folder = tmp_path / "earlier", tmp_path / "out"
    earlier.mkdir()
    record = Record(earlier, "succeed")
    record.row("first", seen_bytes=1)
    record.row("second", failure="no time left")
    append(earlier, {"stage": "fail", "end": "done", "seconds": 1})
    stages = [
        Stage(f.__name__, "", f"{__name__}:{f.__name__}", 60, 0, call)
        for f, call in ((fail, "a"), (succeed, "a"))
    ]
    monkeypatch.setattr(campaign, "STAGES", stages)
    words = [*TINY, "--call", "b", "--continue", str(earlier), "--output", str(folder)]
    assert main(words) == 0
    assert results(folder) == {"fail": "done", "succeed": "done"}
    found = {name: values["seen_bytes"] for name, values in rows(folder, "succeed").items()}
    assert found == {"first": 1, "second": 3 * 10**6}


@pytest.mark.slow
def test_without_a_gpu_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--device cpu" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("has_tool", [True, False])
def test_what_others_use_of_a_card_is_not_free_before_the_context(
    has_tool: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([1000, 1500])  # MiB used by all, before and after this process has its context
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))

    def answer(*_: object, **__: object) -> None:
        tool.write_text(f"#!/bin/sh\necho {next(answers)}\n")
        tool.chmod(0o755)

    if has_tool:
        answer()
    monkeypatch.setattr(torch, "zeros", answer if has_tool else lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    free, total = 8000 * 2**20, 10_000 * 2**20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, total))
    found, not_told = free_before_context()
    assert found == (8500 * 2**20 if has_tool else total)
    assert (not_told is None) == has_tool


def test_text_is_that_of_the_folder_or_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    setting = Setting("cpu", tiny=True, text=tmp_path, record=Record(tmp_path, ""), end=0.0)
    (tmp_path / "notes.md").touch()  # neither text nor tokens
    (tmp_path / "a.txt").write_text("one two three. " * 50, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "one two"}\n' * 3, encoding="utf-8")
    tokens = read_tokens(setting, 300)
    assert 10 < len(tokens) < 800
    assert tokens.min() >= 0
    assert tokens.max() < 300
    assert (tokens == tokens[-1]).sum() == 4  # each document ends
    np.save(tmp_path / "c.npy", np.arange(7, dtype=np.uint16))
    assert read_tokens(setting, 300).tolist() == list(range(7))
    with pytest.raises(ValueError, match="6"):
        read_tokens(setting, 6)


def test_a_torn_line_costs_no_other(tmp_path: Path) -> None:
    record = Record(tmp_path, "stage")
    record.row("first", value=1.5)
    with (tmp_path / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"stage": "stage", "row": "to')
    record.row("second", value=2.5)
    assert rows(tmp_path, "stage") == {"first": {"value": 1.5}, "second": {"value": 2.5}}
    assert {"first", "second"} <= rows_on_page(tmp_path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--output"),
        (["--device", "cpu", "--output", "new"], "--tiny"),
        ([*TINY, "--output", "."], "has results"),
        ([*TINY, "--output", "new", "--text", "nowhere"], "nowhere"),
        ([*TINY, "--output", "new", "--only", "everything"], "everything"),
    ],
)
def test_a_bad_command_is_answered_in_one_line(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("results.jsonl").touch()
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_every_command_of_the_docs_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs" / "gpu.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m tests.benchmarks.campaign (.*)$", page, flags=re.MULTILINE)
    assert len(commands) == 6
    for words in map(shlex.split, commands):
        for option, folder in pairwise(words):
            if option in ("--page", "--continue", "--text"):
                Path(folder).mkdir(exist_ok=True)
        campaign.parse(words)
    stages = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `.*?\|", page, flags=re.MULTILINE)))
    assert stages == NAMES


def test_the_stages_of_a_call_fit_its_time() -> None:
    least = {call: sum(s.least_seconds for s in STAGES if s.call == call) for call in "ab"}
    assert all(least[call] <= seconds for call, seconds in campaign.CALL_SECONDS.items())

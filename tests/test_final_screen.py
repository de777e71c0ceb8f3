"""The final screen of a run: what it names is there, and what it says to type works."""

import contextlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

import cli
from foam_lightning.storage.run_folder import RunFolder
from tests.tiny import write_settings
from tuner.report.final_screen import final_screen

SUMMARY: dict[str, Any] = {
    "final_validation_loss": 2.0,
    "validation_tokens": 480,
    "predicted_peak_bytes": 5_000_000_000,
    "measured_peak_bytes": 5_100_000_000,
    "tokens_per_second": 1234.4,
}


def sections(screen: str) -> dict[str, dict[str, str]]:
    """Read a screen back: rows by name, by section."""
    found: dict[str, dict[str, str]] = {}
    for line in screen.splitlines():
        if not line.startswith("  "):
            found[line] = rows = {}
        else:
            name, _, text = line.strip().partition("  ")
            rows[name] = text.strip()
    return found


def test_it_names_only_files_that_exist(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "my runs" / "version_0")
    folder.path.mkdir(parents=True)
    folder.plan.touch()
    screen = sections(final_screen(folder, SUMMARY))
    assert set(screen["done"]) == {"validation", "memory", "speed"}
    for figure in ("2.0000 nats", "7.39", "480 tokens"):
        assert figure in screen["done"]["validation"]
    assert screen["done"]["memory"] == "peak 5.1 GB measured, 5 GB predicted"
    assert screen["done"]["speed"] == "1234 tokens/s"
    assert screen["files"] == {"run folder": str(folder.path), "plan": str(folder.plan)}
    # A name with a space in it is still one word.
    assert shlex.split(screen["next"]["evaluate"])[-1] == str(folder.last_checkpoint)


def test_it_leaves_out_what_was_not_measured(tmp_path: Path) -> None:
    def results(**figures: Any) -> dict[str, str]:
        return sections(final_screen(RunFolder(tmp_path), {**SUMMARY, **figures}))["done"]

    diverged = results(
        measured_peak_bytes=None, tokens_per_second=None, final_validation_loss=math.nan
    )
    assert set(diverged) == {"validation"}
    assert "loss nan nats" in diverged["validation"]
    assert results(predicted_peak_bytes=None)["memory"] == "peak 5.1 GB measured"
    assert results(skipped_steps=4, rollbacks=1)["skipped"].startswith("4 steps")
    assert "skipped" not in results(skipped_steps=0, rollbacks=0)


@pytest.mark.parametrize(
    ("called", "program"),
    [
        ("/somewhere/bin/foam", "foam"),
        ("cli.py", "python cli.py"),
        ("/a b/cli.py", "python '/a b/cli.py'"),
        ("/somewhere/pytest", "python cli.py"),
    ],
)
def test_commands_call_the_program_as_it_was_called(
    called: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    commands = sections(final_screen(RunFolder(tmp_path), SUMMARY))["next"]
    for name in ("evaluate", "generate"):
        assert commands[name].startswith(f"{program} ")


def asked(address: str) -> Any:
    """Ask until it has read the files, before which it refuses or has nothing."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(HTTPError), urlopen(address, timeout=60) as answer:
            if found := json.loads(answer.read()):
                return found
        time.sleep(0.2)
    raise AssertionError(f"{address} has nothing to show")


def served(command: str, *paths: str) -> list[Any]:
    """Start the TensorBoard of a command, and ask it for some pages."""
    program, *words = shlex.split(command)
    beside = Path(sys.executable).with_name(program)
    process = subprocess.Popen(
        [str(beside), *words, "--port", "0", "--load_fast", "false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    try:
        assert process.stderr is not None
        address = next(filter(None, (re.search(r"http://\S+", line) for line in process.stderr)))
        return [asked(address[0].rstrip("/") + path) for path in paths]
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself
def test_every_command_that_it_prints_works(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = write_settings(tmp_path)
    assert cli.main(["fit", "--config", str(settings), "--model.level", "2"]) == 0
    output = capfd.readouterr().out
    screen = sections(output[output.index("done\n") :])
    assert list(screen) == ["done", "files", "next"]
    assert set(screen["files"]) == {"run folder", "plan", "summary", "checkpoint", "Hugging Face"}
    for path in screen["files"].values():
        assert Path(path).exists()
    assert set(screen["next"]) == {"watch", "evaluate", "generate"}

    program, script, *words = shlex.split(screen["next"]["evaluate"])
    assert (program, script) == ("python", "cli.py")
    assert cli.main(words) == 0
    assert screen["done"]["validation"].partition(" nats")[0] in capfd.readouterr().out

    program, script, *words = shlex.split(screen["next"]["generate"])
    assert (program, script) == ("python", "cli.py")
    assert cli.main(words) == 0
    assert capfd.readouterr().out.startswith("def ")

    layout, hparams = served(
        screen["next"]["watch"],
        "/data/plugin/custom_scalars/layout",
        "/data/plugin/hparams/experiment?request={}",
    )
    assert [group["title"] for group in layout["category"]] == [
        "loss",
        "folding",
        "memory",
        "throughput",
    ]
    assert "final/validation_loss" in json.dumps(hparams)

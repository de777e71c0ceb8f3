"""The final screen of a run: what it names is there, and what it says to type works."""

import math
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

import cli
from foam_lightning.storage.run_folder import RunFolder
from tests.support.tiny import write_settings
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself
def test_every_command_that_it_prints_works(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = write_settings(tmp_path)
    assert cli.main(["fit", "--config", str(settings), "--model.level", "2"]) == 0
    output, errors = capfd.readouterr()
    assert "%|" not in errors  # the bars of other libraries
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

    program, *words = shlex.split(screen["next"]["watch"])
    assert (program, words[0]) == ("tensorboard", "--logdir")
    runs = EventMultiplexer().AddRunsFromDirectory(words[1]).Reload().Runs()
    assert "validation/loss" in runs["version_0"]["scalars"]

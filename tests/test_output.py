"""Output that nobody reads, and errors that nobody foresaw, end in one line at most."""

import subprocess
import sys
from pathlib import Path

import pytest

import cli
from foam_lightning.errors import UnexpectedError
from tests.support.tiny import REPOSITORY, write_settings
from tuner.commands import fit as fit_command
from tuner.commands import plan as plan_command
from tuner.run_context import save_traceback

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself


def shell(command: str, folder: Path) -> tuple[int, str]:
    """Run a pipeline that has CLI in it; return the code of its first part, and stderr."""
    line = command.replace("CLI", f"{sys.executable} {REPOSITORY / 'cli.py'}")
    line = f"exec 2>{folder}/err; {line}; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", line], cwd=REPOSITORY, capture_output=True, check=False)
    return run.returncode, (folder / "err").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("CLI --help | true", 141),  # as SIGPIPE would end it
        ("CLI --help >&-", 0),
        ("CLI fit --memory-budget 24 2>&-", 2),
    ],
)
def test_closed_output_is_no_error(command: str, code: int, tmp_path: Path) -> None:
    assert shell(command, tmp_path) == (code, "")


def test_a_full_disk_under_the_output_is_one_line(tmp_path: Path) -> None:
    code, err = shell("CLI --help > /dev/full", tmp_path)
    assert code == 5
    assert err.startswith("error: cannot read or write standard output: No space left on device")
    assert err.count("\n") == 1


def test_training_goes_on_when_nobody_reads_its_output(tmp_path: Path) -> None:
    config = write_settings(tmp_path)
    code, err = shell(f"CLI fit --config {config} --trainer.max_steps 2 | true", tmp_path)
    assert code == 0
    assert err.count("\n") == 1
    assert "fit goes on without it" in err
    assert (tmp_path / "runs/default/version_0/summary.json").exists()


def test_an_unexpected_error_is_one_line_and_its_traceback_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("a library\nfailed")

    words = ["fit", "--config", str(write_settings(tmp_path))]
    monkeypatch.setattr(fit_command, "fit", fail)
    assert cli.main(words) == 1
    err = capfd.readouterr().err
    path = tmp_path / "runs/default/version_0/traceback.txt"
    assert err == f"error: unexpected ValueError: a library; the traceback is in {path}\n"
    assert "in fail" in path.read_text(encoding="utf-8")
    assert cli.main([*words, "--debug"]) == 1
    assert "in fail" in capfd.readouterr().err
    assert not (tmp_path / "runs/default/version_1").exists(), "--debug continues the same run"
    monkeypatch.setattr(plan_command, "plan", fail)
    assert cli.main(["plan", *words[1:]]) == 1
    assert capfd.readouterr().err.endswith("shown with --debug\n")


@pytest.mark.parametrize("rank", ["0", "3"])
def test_every_rank_keeps_its_own_traceback(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(UnexpectedError, match="KeyError"), save_traceback(tmp_path):
        raise KeyError("x")
    with pytest.raises(KeyError), save_traceback(tmp_path / "missing"):
        raise KeyError("x")
    with pytest.raises(FileNotFoundError), save_traceback(tmp_path):  # has a line of its own
        Path("missing").read_text()
    assert [p.name for p in tmp_path.iterdir()] == [f"traceback{'_3' * (rank == '3')}.txt"]

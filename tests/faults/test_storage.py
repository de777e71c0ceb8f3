"""Full disks and damaged or missing files are one line, and the same command resumes."""

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import cli
from foam_lightning.callbacks.residual_energy import ResidualEnergy
from foam_lightning.checkpoint.io import previous_checkpoint
from foam_lightning.checkpoint.load import read_checkpoint
from foam_lightning.data import loader
from foam_lightning.errors import CheckpointError
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.training import train
from tests.data.test_streamed_run import streamed_settings
from tests.faults.limits import files_up_to
from tests.support.runs import Finished, NewJob, StopAfter, StopError, open_folder, small
from tests.support.tiny import write_settings

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself


# ---- damaged checkpoints


@pytest.fixture(scope="module")
def stopped(
    finished: Finished, new_job: NewJob, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    """A run that was stopped after step 7, with checkpoints of steps 4 and 6."""
    folder = open_folder(tmp_path_factory.mktemp("stopped"))
    with pytest.raises(StopError):
        train(small(new_job, callbacks=[StopAfter(7)]), finished.plan, folder)
    return folder


@pytest.fixture
def broken(stopped: RunFolder, tmp_path: Path) -> RunFolder:
    """Copy it, with times of files as if the clock had been set back."""
    shutil.copytree(stopped.path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    os.utime(folder.last_checkpoint, (0, 0))
    os.utime(previous_checkpoint(folder.last_checkpoint), (time.time() + 10**6,) * 2)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "reason"), [(cut, "truncated"), (flip, "checksum")])
def test_a_damaged_checkpoint_is_renamed_and_the_previous_one_resumed(
    finished: Finished,
    broken: RunFolder,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    damage(broken.last_checkpoint)
    capfd.readouterr()
    trained = train(finished.job, finished.plan, broken)
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "cannot read" in line]
    assert line.startswith(f"cannot read the checkpoint {broken.last_checkpoint}: ")
    assert reason in line
    assert "damaged.ckpt" in line
    assert line.endswith("step 4")
    assert trained.final_validation_loss == finished.trained.final_validation_loss
    expected = read_checkpoint(finished.folder.last_checkpoint)["state_dict"]
    found = read_checkpoint(broken.last_checkpoint)["state_dict"]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    names = sorted(path.name for path in broken.checkpoints.iterdir())
    assert names == ["damaged.ckpt", "last.ckpt"]


def test_a_run_without_an_intact_checkpoint_is_refused(
    finished: Finished, broken: RunFolder
) -> None:
    cut(broken.last_checkpoint)
    cut(previous_checkpoint(broken.last_checkpoint))
    with pytest.raises(CheckpointError, match=r"previous\.ckpt: truncated"):
        train(finished.job, finished.plan, broken)
    names = sorted(path.name for path in broken.checkpoints.iterdir())
    assert names == ["last.ckpt", "previous.ckpt"]


# ---- whole commands


At = Callable[[int, Callable[[], None]], None]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> At:
    """Return `at(step, act)`: the next run calls `act` in the middle of that step, once."""

    def at(step: int, act: Callable[[], None]) -> None:
        def act_once(_: Callback, trainer: Trainer, *__: Any) -> None:
            if trainer.global_step == step:
                monkeypatch.undo()
                act()

        monkeypatch.setattr(ResidualEnergy, "on_before_backward", act_once)

    return at


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    return err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_settings(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def undisturbed(settings: Path) -> RunFolder:
    """The run of the settings that is not disturbed."""
    assert cli.main(["fit", "--config", str(settings), "--name", "undisturbed"]) == 0
    return RunFolder(settings.parent / "runs" / "undisturbed" / "version_0")


def ends_like(undisturbed: RunFolder, runs: Path) -> bool:
    """Return whether the only run ended with the loss of the undisturbed one, without leftovers."""
    (folder,) = (runs / "default").iterdir()
    assert not [path for path in runs.rglob("*") if ".part" in path.name]
    losses = [
        json.loads(path.read_text())["final_validation_loss"]
        for path in (undisturbed.summary, folder / "summary.json")
    ]
    return bool(losses[0] == losses[1])


def test_a_full_disk_is_one_line_and_the_run_resumes(
    settings: Path, undisturbed: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--config", str(settings), "--runs", str(tmp_path)]
    checkpoint = RunFolder(tmp_path / "default" / "version_0").last_checkpoint
    with files_up_to(undisturbed.last_checkpoint.stat().st_size - 1000):
        assert cli.main(words) == 5
    assert last_line(capfd).startswith(f"error: cannot read or write {checkpoint}: File too large;")
    assert list(checkpoint.parent.iterdir()) == []
    assert cli.main(words) == 0
    assert ends_like(undisturbed, tmp_path)


@pytest.mark.usefixtures("undisturbed")  # which has prepared the text
def test_a_full_disk_in_a_search_is_one_line(
    settings: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(settings), "--runs", str(tmp_path), "--memory-budget", "24GB"]
    with files_up_to(100_000):
        assert cli.main(["tune", *words]) == 5
    assert last_line(capfd).startswith("error: cannot read or write the search database: ")


def test_a_data_worker_that_hangs_is_one_line(
    settings: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "WORKER_TIMEOUT_SECONDS", 2)
    monkeypatch.setattr(loader, "survive_signals", lambda _: time.sleep(600))  # as it starts
    command = ["fit", "--config", str(settings), "--runs", str(tmp_path)]
    assert cli.main([*command, "--data.num_workers", "1"]) == 5
    assert "data worker failed (DataLoader timed out" in last_line(capfd)


def test_a_data_worker_that_dies_is_one_line_and_the_run_resumes(
    settings: Path,
    undisturbed: RunFolder,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    at: At,
) -> None:
    command = ["fit", "--config", str(settings), "--runs", str(tmp_path)]
    command += ["--data.num_workers", "1"]

    def kill() -> None:
        for process in multiprocessing.active_children():
            process.kill()
            process.join()

    at(7, kill)
    assert cli.main(command) == 5
    assert last_line(capfd).startswith("error: a data worker failed (DataLoader worker ")
    assert cli.main(command) == 0
    assert ends_like(undisturbed, tmp_path)


def test_a_shard_that_vanishes_is_one_line(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    at: At,
) -> None:
    settings = streamed_settings(tmp_path / "run")
    words = ["fit", "--config", str(settings), "--data.validation_files"]
    words.append(str(settings.parent / "text.txt"))
    shards = [settings.parent / f"{index}.jsonl" for index in range(3)]
    for shard in shards:  # an epoch of a few steps, after which the files are opened again
        shard.write_text("".join(shard.read_text().splitlines(keepends=True)[:3]))

    def vanish() -> None:
        for shard in shards:
            shard.unlink()

    at(3, vanish)
    assert cli.main(words) == 2
    assert str(shards[0]) in last_line(capfd)

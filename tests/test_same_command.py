"""The same command typed again: which version goes on, from where, and how a run ends."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

import cli
from foam_lightning.checkpoint.load import read_checkpoint
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.training import Export  # type: ignore[attr-defined]
from tests.support.tiny import write_settings
from tuner.config.identity import run_identity
from tuner.config.parser import parse

STEPS = 16


class StoppedError(Exception):
    pass


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Return a function after which runs end at the start of a step, as if killed."""
    steps: list[int | None] = [None]

    class Stop(Export):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == steps[0]:
                raise StoppedError

    monkeypatch.setattr("foam_lightning.training.Export", Stop)

    def stop(step: int | None) -> None:
        steps[0] = step

    return stop


class Runs:
    """Commands on one folder, and what they print."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self.settings = folder, write_settings(folder)
        self._capfd = capfd

    def fit(self, *words: str, code: int = 0, name: str = "default") -> str:
        self._capfd.readouterr()
        options = ["--config", str(self.settings), "--name", name, *words]
        assert cli.main(["fit", *options]) == code
        return "".join(self._capfd.readouterr())

    def steps(self, name: str = "default") -> list[int | None]:
        """List the steps of the last checkpoints, by version."""
        versions = sorted((self.folder / "runs" / name).iterdir())
        files = [version / "checkpoints" / "last.ckpt" for version in versions]
        return [read_checkpoint(f)["global_step"] if f.exists() else None for f in files]

    def version(self, number: int, name: str = "default") -> RunFolder:
        return RunFolder(self.folder / "runs" / name / f"version_{number}")

    def summary(self, number: int) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.version(number).summary.read_text())
        return content


@pytest.fixture
def runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Runs:
    return Runs(tmp_path, capfd)


def test_each_command_goes_on_with_its_own_version(
    runs: Runs, stop_at: Callable[[int | None], None]
) -> None:
    stop_at(9)
    runs.fit(code=1)
    said = runs.fit("--model.lr", "0.01", code=1)
    assert "version_0, unfinished at step 8, has another model.lr" in said
    stop_at(13)
    said = runs.fit(code=1)
    assert f"version_0, at step 8 of {STEPS}" in said
    assert runs.steps() == [12, 8]
    stop_at(None)
    assert f"version_1, at step 8 of {STEPS}" in runs.fit("--model.lr", "0.01")
    assert runs.steps() == [12, STEPS]
    runs.fit()
    assert runs.steps() == [STEPS, STEPS]


def test_a_run_is_found_by_what_changes_its_result(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(*words: str) -> RunFolder | None:
        options = ["--config", str(runs.settings), *words]
        settings = parse("fit", options, default=None)
        identity = run_identity(settings)
        return RunFolder.find_unfinished(Path(settings.runs), settings.name, identity)

    options = ["--config", str(runs.settings), "--data.micro_batch_size", "2"]
    options += ["--memory-budget", "1GB", "--trainer.precision", "bf16"]
    settings = parse("fit", options, default=None)
    RunFolder.open(Path(settings.runs), "default", run_identity(settings))
    monkeypatch.chdir(runs.folder)
    Path("copy").mkdir()
    shutil.copy("text.txt", "copy/words.txt")
    Path("runs/default").rename("runs/renamed")
    renamed = ("--name", "renamed", *options[2:])
    for words in (
        [],
        ["--trainer.enable_progress_bar", "false"],
        ["--trainer.log_every_n_steps", "3"],
        ["--trainer.val_check_interval", "4"],
        ["--trainer.max_time", "00:01:00:00"],
        ["--model.max_skipped_steps", "20"],
        ["--data.files", "text.txt"],
        ["--data.files", "copy/words.txt"],
        ["--data.cache_dir", "cache"],
        ["--data.num_workers", "1"],
        ["--runs", "runs"],
        ["--model.lr", "2e-2"],
        ["--trainer.precision", "bf16-mixed"],
        ["--memory-budget", "1000MB"],
        ["--debug"],
    ):
        assert find(*renamed, *words), words
    Path("copy/words.txt").write_text("others " * 1000)
    for words in (
        ["--model.weight_decay", "0.1"],
        ["--model.level", "3"],
        ["--data.files", "copy/words.txt"],
        ["--data.batch_size", "8"],
        ["--seed_everything", "1"],
        ["--memory-budget", "2GB"],
        ["--data.micro_batch_size", "null"],
        ["--trainer.max_steps", "40"],
        ["--trainer.max_epochs", "1"],
        ["--trainer.precision", "bf16-true"],
        ["--ckpt_path", "copy/words.txt"],
        ["--tune.trials", "6"],
    ):
        assert not find(*renamed, *words), words
    # A file that has changed is another input, until there is something to go on from.
    Path("text.txt").write_text("others " * 1000)
    assert not find(*renamed)
    Path("runs/renamed/version_0/checkpoints").mkdir()
    Path("runs/renamed/version_0/checkpoints/last.ckpt").touch()
    assert find(*renamed)


def test_a_run_whose_text_has_changed_says_so(
    runs: Runs, stop_at: Callable[[int | None], None]
) -> None:
    stop_at(5)
    runs.fit(code=1)
    text = runs.folder / "text.txt"
    text.write_text(text.read_text() + "\n# more\n")
    said = runs.fit(code=1)
    assert "version_0, at step 4" in said
    assert "data.files have changed" in said


def test_a_finished_run_says_so_and_is_extended_by_max_steps_alone(
    runs: Runs, stop_at: Callable[[int | None], None]
) -> None:
    runs.fit()
    before = runs.version(0).summary.read_text()
    said = runs.fit()
    assert f"version_0 is finished at step {STEPS}" in said
    assert "--trainer.max_steps above 16" in said
    stop_at(20)
    assert f"from step {STEPS} to 24" in runs.fit("--trainer.max_steps", "24", code=1)
    assert runs.steps() == [STEPS, 18]
    stop_at(None)
    runs.version(0).last_checkpoint.rename(runs.folder / "away")  # it has one of its own
    assert "version_1, at step 18 of 24" in runs.fit("--trainer.max_steps", "24")
    (runs.folder / "away").rename(runs.version(0).last_checkpoint)
    assert runs.steps() == [STEPS, 24]
    assert runs.version(0).summary.read_text() == before
    assert runs.summary(1)["steps"] == 24
    assert runs.summary(1)["started_from"] == str(runs.version(0).last_checkpoint)
    assert "version_1 is finished at step 24" in runs.fit("--trainer.max_steps", "24")
    assert "version_0 is finished at step 16" in runs.fit()
    # A shorter run is another one.
    runs.fit("--trainer.max_steps", "8")
    assert runs.steps() == [STEPS, 24, 8]


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "advised"),
    [
        (16, None, "max_steps above 16"),
        (16, 9, "max_steps above 16"),
        (-1, 1, "max_epochs"),
        (50, 1, "max_epochs"),
    ],
)
def test_a_finished_run_is_trained_on_by_the_limit_that_ended_it(
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
    max_steps: int,
    max_epochs: int | None,
    advised: str,
) -> None:
    monkeypatch.setattr("tuner.run_context.count_steps", lambda _: 16)
    words = ["--trainer.max_steps", str(max_steps)]
    words += [] if max_epochs is None else ["--trainer.max_epochs", str(max_epochs)]
    settings = parse("fit", ["--config", str(runs.settings), *words], default=None)
    RunFolder.open(Path(settings.runs), "default", run_identity(settings)).summary.touch()
    assert f"raise --trainer.{advised}, and" in runs.fit(*words).replace("\n", " ")


def test_an_edited_text_is_not_the_finished_run_nor_extends_it(
    runs: Runs, stop_at: Callable[[int | None], None]
) -> None:
    runs.fit()
    text = runs.folder / "text.txt"
    text.write_text(text.read_text() + "\n# more\n")
    stop_at(5)
    for words in ([], ["--trainer.max_steps", "24"]):
        said = runs.fit(*words, code=1)
        assert "is finished" not in said
        assert "extending" not in said
    assert runs.steps()[1] == 4


def test_a_run_of_an_older_version_goes_on(
    runs: Runs, stop_at: Callable[[int | None], None]
) -> None:
    stop_at(9)
    runs.fit(code=1)
    settings = runs.version(0).path / ".settings.json"
    config = yaml.safe_load(runs.version(0).config.read_text())
    del config["model"]["schedule"]  # a setting that did not exist then
    runs.version(0).config.write_text(yaml.safe_dump(config))
    settings.write_text(json.dumps({"settings_sha256": "of another text"}))
    assert "going on with" not in runs.fit("--model.lr", "0.01", code=1)
    assert f"version_0, at step 8 of {STEPS}" in runs.fit(code=1)


def test_a_run_that_time_ends_says_so_and_goes_on(runs: Runs) -> None:
    words = ["--trainer.max_steps", "100000", "--trainer.max_time"]
    said = runs.fit(*words, "00:00:00:01")
    (first,) = runs.steps()
    assert first
    assert f"trainer.max_time 0:00:01 at step {first} of 100000" in said
    assert f"{100_000 - first} steps are left" in said
    assert "done" not in said.splitlines()
    assert str(runs.version(0).last_checkpoint) in said
    said = runs.fit(*words, "00:00:00:01")
    assert f"version_0, at step {first} of 100000" in said
    (second,) = runs.steps()
    assert second
    assert second > first
    assert not runs.version(0).is_finished


def test_time_ends_a_run_after_a_whole_step(runs: Runs) -> None:
    words = ["--data.micro_batch_size", "1", "--trainer.max_time", "00:00:00:01"]
    runs.fit("--trainer.max_steps", "100000", *words)
    (step,) = runs.steps()
    content = read_checkpoint(runs.version(0).last_checkpoint)
    counts = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert counts["completed"] == 4 * (step or 0)


def test_epochs_alone_end_a_run(runs: Runs) -> None:
    words = ["--trainer.max_steps", "-1", "--trainer.limit_train_batches", "6"]
    said = runs.fit(*words, "--trainer.max_epochs", "1")
    (steps,) = runs.steps()
    assert steps
    assert f"training: {steps} steps" in said
    assert f"step {steps}/{steps}" in said
    content = read_checkpoint(runs.version(0).last_checkpoint)
    assert content["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.1 * 0.02)
    said = runs.fit(*words, "--trainer.max_epochs", "1")
    assert f"version_0 is finished at step {steps}" in said
    assert "raise --trainer.max_epochs" in said
    start = ("--ckpt_path", str(runs.version(0).last_checkpoint))
    said = runs.fit(*words, "--trainer.max_epochs", "1", *start, name="second", code=2)
    assert "raise --trainer.max_epochs" in said
    said = runs.fit(*words, "--trainer.max_epochs", "2")
    assert f"from step {steps} to {2 * steps}" in said
    assert runs.steps() == [steps, 2 * steps]


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["--trainer.max_steps", "1000", "--trainer.max_epochs", "1"], 1.0),
        (["--trainer.max_steps", "3", "--trainer.max_epochs", "1"], 3),
        (["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3"], 6),
        (["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "0.5"], None),
    ],
)
def test_the_length_of_a_run_is_the_true_one_whatever_the_micro_batch(
    runs: Runs, words: list[str], steps: float | None
) -> None:
    options = ["--config", str(runs.settings), "--trainer.max_steps", "-1", *words]
    job = parse("fit", options, default=None).job()
    epoch = job.new_data(job.memory_options).steps_per_epoch()
    assert epoch
    found = job.with_steps().trainer.max_steps
    assert found == (2 * (epoch // 2) if steps is None else epoch if steps == 1.0 else steps)
    one = parse("fit", [*options, "--data.micro_batch_size", "1"], default=None).job()
    assert one.with_steps().trainer.max_steps == found
    trainer = one.with_steps().new_trainer(one.memory_options, [], logger=False)
    assert trainer.limit_train_batches in (1.0, 4 * 3, 4 * (epoch // 2))


def test_a_stream_has_no_epochs(runs: Runs) -> None:
    words = ["--data.streaming", "true", "--trainer.max_steps", "-1", "--trainer.max_epochs", "1"]
    assert "set trainer.max_steps" in runs.fit(*words, code=2)
    assert not (runs.folder / "runs").exists()


class StopsAtStep(Callback):
    """Asks the trainer to stop in the middle of a step."""

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, number: int
    ) -> None:
        if number == 5 * 4 + 1:  # the second of the four micro-batches of the sixth step
            trainer.should_stop = True


def test_early_stopping_ends_a_run_which_says_so(runs: Runs) -> None:
    stopping = {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {"monitor": "validation/loss", "patience": 1, "mode": "max"},
    }
    content = yaml.safe_load(runs.settings.read_text())
    content["trainer"] |= {"callbacks": [stopping], "max_steps": 50, "val_check_interval": 2}
    runs.settings.write_text(yaml.safe_dump(content))
    said = runs.fit()
    (steps,) = runs.steps()
    assert steps
    assert steps < 50
    assert f"by EarlyStopping at step {steps} of 50" in said
    assert runs.summary(0)["ended_by"] == "EarlyStopping"
    assert f"version_0 is finished at step {steps}" in runs.fit()


def test_a_callback_that_stops_a_run_ends_it_after_a_whole_step(runs: Runs) -> None:
    words = ["--data.micro_batch_size", "1", "--allow-class-paths", "tests.test_same_command"]
    words += ["--trainer.callbacks", '[{"class_path": "tests.test_same_command.StopsAtStep"}]']
    assert f"by a callback at step 6 of {STEPS}" in runs.fit(*words)
    assert runs.steps() == [6]


def test_a_checkpoint_past_the_end_is_refused_and_leaves_no_folder(runs: Runs) -> None:
    runs.fit(name="first")
    path = str(runs.version(0, "first").last_checkpoint)
    for end in ("6", str(STEPS)):
        words = ["--ckpt_path", path, "--trainer.max_steps", end]
        assert "nothing is left to train" in runs.fit(*words, name="second", code=2)
    assert not (runs.folder / "runs" / "second").exists()


def test_a_start_from_a_checkpoint_goes_on_by_what_it_holds(
    runs: Runs, stop_at: Callable[[int | None], None]
) -> None:
    runs.fit(name="first")
    start = runs.folder / "start.ckpt"
    shutil.copy(runs.version(0, "first").last_checkpoint, start)
    words = ["--trainer.max_steps", "24", "--model.lr", "0.004", "--ckpt_path"]
    stop_at(20)
    runs.fit(*words, str(start), name="second", code=1)
    start.rename(runs.folder / "moved.ckpt")
    stop_at(None)
    runs.fit(*words, str(runs.folder / "moved.ckpt"), name="second")
    assert runs.steps("second") == [24]
    content = torch.load(runs.version(0, "second").last_checkpoint, weights_only=True)
    assert content["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.004

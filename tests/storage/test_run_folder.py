import os
from pathlib import Path

import pytest

from foam_lightning.errors import ConfigError
from foam_lightning.storage.atomic import write_json
from foam_lightning.storage.run_folder import RunFolder


def test_runs_are_numbered_and_named(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "runs", "mine", "settings")
    assert folder.path == tmp_path / "runs" / "mine" / "version_0"
    assert RunFolder.open(tmp_path / "runs", "other", "settings").path.name == "version_0"
    files = (folder.config, folder.plan, folder.summary, folder.last_checkpoint)
    folders = (folder.tuning, folder.checkpoints, folder.tokenizer, folder.hf)
    assert [str(path.relative_to(folder.path)) for path in (*files, *folders)] == [
        *("config.yaml", "fold_plan.json", "summary.json", "checkpoints/last.ckpt"),
        *("tuning", "checkpoints", "tokenizer", "hf"),
    ]


def test_an_unfinished_run_of_the_same_settings_is_resumed_until_it_is_finished(
    tmp_path: Path,
) -> None:
    first = RunFolder.open(tmp_path, "run", "lr: 1")
    assert RunFolder.open(tmp_path, "run", "lr: 1") == first
    write_json(first.summary, {})
    assert RunFolder.open(tmp_path, "run", "lr: 1").path.name == "version_1"


def test_other_settings_are_another_run(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, "run", "lr: 1")
    assert RunFolder.open(tmp_path, "run", "lr: 2").path.name == "version_1"
    assert RunFolder.open(tmp_path, "run", "lr: 2").path.name == "version_1"
    # Only the newest version can be resumed.
    assert RunFolder.open(tmp_path, "run", "lr: 1").path.name == "version_2"


@pytest.mark.parametrize("settings", ["lr: 1", "lr: 2"])
def test_the_same_settings_started_at_once_are_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str
) -> None:
    others: list[RunFolder] = []
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target.name == "version_0":
            monkeypatch.undo()
            others.append(RunFolder.open(tmp_path, "run", settings))
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    mine = RunFolder.open(tmp_path, "run", "lr: 1")
    assert [other.path.name for other in others] == ["version_0"]
    assert (mine == others[0]) == (settings == "lr: 1")
    assert set((tmp_path / "run").iterdir()) == {mine.path, others[0].path}
    assert RunFolder.open(tmp_path, "run", "lr: 1") == mine


def test_versions_are_ordered_by_number_not_by_time(tmp_path: Path) -> None:
    for name, seconds in (("2", 300), ("9", 200), ("10", 100), ("x", 400), ("", 400)):
        path = tmp_path / "run" / f"version_{name}" / "study.db"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (seconds, seconds))
    assert RunFolder.open(tmp_path, "run", "").path.name == "version_11"
    folder = RunFolder(tmp_path / "run" / "version_9")
    found = [path.parent.name for path in folder.other_versions("study.db")]
    assert found == ["version_2", "version_10"]


@pytest.mark.parametrize("content", ["", "[]", "{}", "{"])
def test_a_version_with_damaged_settings_is_not_resumed(tmp_path: Path, content: str) -> None:
    folder = RunFolder.open(tmp_path, "run", "")
    (folder.path / ".settings.json").write_text(content)
    assert RunFolder.open(tmp_path, "run", "").path.name == "version_1"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write the run folder .*--runs"):
        RunFolder.open(tmp_path / "file", "run", "")

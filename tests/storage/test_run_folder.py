import json
import os
from pathlib import Path

import pytest

from foam_lightning.errors import ConfigError
from foam_lightning.storage.atomic import write_json
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.storage.run_identity import RunIdentity, named_files


def rate(lr: int) -> RunIdentity:
    return RunIdentity({"lr": lr})


def test_runs_are_numbered_and_named(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "runs", "mine", RunIdentity())
    assert folder.path == tmp_path / "runs" / "mine" / "version_0"
    assert RunFolder.open(tmp_path / "runs", "other", RunIdentity()).path.name == "version_0"
    files = (folder.config, folder.plan, folder.summary, folder.last_checkpoint)
    folders = (folder.tuning, folder.checkpoints, folder.tokenizer, folder.hf)
    assert [str(path.relative_to(folder.path)) for path in (*files, *folders)] == [
        *("config.yaml", "fold_plan.json", "summary.json", "checkpoints/last.ckpt"),
        *("tuning", "checkpoints", "tokenizer", "hf"),
    ]


def test_an_unfinished_run_of_the_same_settings_is_resumed_until_it_is_finished(
    tmp_path: Path,
) -> None:
    first = RunFolder.open(tmp_path, "run", rate(1))
    assert RunFolder.open(tmp_path, "run", rate(1)) == first
    assert RunFolder.find_finished(tmp_path, "run", rate(1)) == []
    write_json(first.summary, {})
    assert RunFolder.find_unfinished(tmp_path, "run", rate(1)) is None
    assert RunFolder.find_finished(tmp_path, "run", rate(1)) == [first]
    assert RunFolder.find_finished(tmp_path, "run", rate(2)) == []
    assert RunFolder.find_finished(tmp_path, "run", rate(2), ignoring=["lr"]) == [first]
    assert RunFolder.open(tmp_path, "run", rate(1)).path.name == "version_1"


def test_a_finished_run_is_another_one_once_a_file_was_edited(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"

    def write(content: str) -> RunIdentity:
        text.write_text(content)
        return RunIdentity({"files": [named_files(str(text))]})

    first = RunFolder.open(tmp_path, "run", write("one"))
    first.checkpoints.mkdir()
    first.last_checkpoint.touch()
    assert RunFolder.find_unfinished(tmp_path, "run", write("two")) == first
    write_json(first.summary, {})
    assert RunFolder.find_finished(tmp_path, "run", write("two"), ignoring=["lr"]) == []
    assert RunFolder.find_finished(tmp_path, "run", write("one")) == [first]


def test_other_settings_are_another_run(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, "run", rate(1))
    assert RunFolder.open(tmp_path, "run", rate(2)).path.name == "version_1"
    assert RunFolder.open(tmp_path, "run", rate(2)).path.name == "version_1"
    assert RunFolder.open(tmp_path, "run", rate(1)) == first
    assert first.differences(rate(2)) == ["lr"]


def test_a_setting_that_an_older_run_lacks_has_its_default(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path, "run", rate(1))
    newer = RunIdentity({"lr": 1, "schedule": "cosine"}, lambda: {"schedule": "cosine"})
    assert RunFolder.find_unfinished(tmp_path, "run", newer) == first
    other = RunIdentity({"lr": 1, "schedule": "linear"}, lambda: {"schedule": "cosine"})
    assert RunFolder.find_unfinished(tmp_path, "run", other) is None


@pytest.mark.parametrize("config", [{"lr": 1}, {"lr": 2}, None])
def test_a_run_of_an_older_version_is_known_by_its_whole_configuration(
    tmp_path: Path, config: dict[str, int] | None
) -> None:
    first = RunFolder.open(tmp_path, "run", RunIdentity(text="lr: 1"))
    settings = first.path / ".settings.json"
    record = json.loads(settings.read_text())
    settings.write_text(json.dumps({"settings_sha256": record["settings_sha256"]}))

    def find(text: str) -> RunFolder | None:
        identity = RunIdentity({"lr": 1}, text=text, parse=lambda _: config)
        return RunFolder.find_unfinished(tmp_path, "run", identity)

    assert find("lr: 1") == first
    assert find("lr: 1\nnew: 0") == (first if config == {"lr": 1} else None)


def test_the_checkpoint_that_a_run_started_from_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = RunFolder.open(tmp_path, "run", rate(1), start=Path("a.ckpt"))
    assert first.start == tmp_path / "a.ckpt"
    assert RunFolder.open(tmp_path, "run", rate(1), start=Path("b.ckpt")).start == first.start
    assert RunFolder.open(tmp_path, "run", rate(2)).start is None


@pytest.mark.parametrize("lr", [1, 2])
def test_the_same_settings_started_at_once_are_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lr: int
) -> None:
    others: list[RunFolder] = []
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target.name == "version_0":
            monkeypatch.undo()
            others.append(RunFolder.open(tmp_path, "run", rate(lr)))
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    mine = RunFolder.open(tmp_path, "run", rate(1))
    assert [other.path.name for other in others] == ["version_0"]
    assert (mine == others[0]) == (lr == 1)
    assert set((tmp_path / "run").iterdir()) == {mine.path, others[0].path}
    assert RunFolder.open(tmp_path, "run", rate(1)) == mine


def test_versions_are_ordered_by_number_not_by_time(tmp_path: Path) -> None:
    for name, seconds in (("2", 300), ("9", 200), ("10", 100), ("x", 400), ("", 400)):
        path = tmp_path / "run" / f"version_{name}" / "study.db"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (seconds, seconds))
    assert RunFolder.open(tmp_path, "run", RunIdentity()).path.name == "version_11"
    folder = RunFolder(tmp_path / "run" / "version_9")
    found = [path.parent.name for path in folder.other_versions("study.db")]
    assert found == ["version_2", "version_10"]


@pytest.mark.parametrize("content", ["", "[]", "{}", "{"])
def test_a_version_with_damaged_settings_is_not_resumed(tmp_path: Path, content: str) -> None:
    folder = RunFolder.open(tmp_path, "run", RunIdentity())
    (folder.path / ".settings.json").write_text(content)
    assert RunFolder.open(tmp_path, "run", RunIdentity()).path.name == "version_1"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write the run folder .*--runs"):
        RunFolder.open(tmp_path / "file", "run", RunIdentity())

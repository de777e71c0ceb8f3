"""Two runs started in one folder: the second refuses, in one line, and does no harm."""

from pathlib import Path

import pytest

import cli
from foam_lightning.errors import BusyError
from foam_lightning.storage.run_folder import RunFolder
from tests.runs import Finished
from tests.tiny import write_settings

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself


def test_a_folder_is_held_by_one_and_free_after_that(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "run", "")
    with folder.held():
        with pytest.raises(BusyError, match=r"another process trains in .*version_0; wait"):
            folder.held().__enter__()
        with RunFolder.open(tmp_path, "other", "").held():
            pass
    with folder.held():
        pass


def test_ranks_are_held_for_by_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.open(tmp_path, "run", "")
    with folder.held():
        monkeypatch.setenv("RANK", "1")
        with folder.held():
            pass


@pytest.mark.parametrize("budget", [(), ("--memory-budget", "24GB")], ids=["plain", "budget"])
def test_the_second_of_two_runs_refuses(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], budget: tuple[str, ...]
) -> None:
    words = ["fit", "--config", str(write_settings(tmp_path)), *budget]
    first = tmp_path / "runs" / "default" / "version_0"
    # The first of them, in its first step: another process, as far as a lock is concerned.
    folders: list[list[str]] = []

    def names() -> list[str]:
        return sorted(str(path.relative_to(first)) for path in first.rglob("*"))

    opened = RunFolder.open

    def open_and_hold(root: Path, name: str, settings: str) -> RunFolder:
        folder = opened(root, name, settings)
        context = folder.held()
        context.__enter__()
        holders.append(context)
        folders.append(names())
        return folder

    holders: list[object] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunFolder, "open", staticmethod(open_and_hold))
        assert cli.main(words) == 6
    _, err = capfd.readouterr()
    assert err.strip().splitlines()[-1] == (
        f"error: another process trains in {first}; wait for its end, or start a run of its own "
        "with --name"
    )
    assert set(names()) - set(folders[0]) <= {"config.yaml"}


def test_an_export_to_a_folder_that_another_writes_is_refused(
    finished: Finished, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from filelock import FileLock

    output = tmp_path / "out"
    words = ["export", "--ckpt_path", str(finished.folder.last_checkpoint), "--output", str(output)]
    with FileLock(tmp_path / ".out.lock"):
        assert cli.main(words) == 6
        assert capfd.readouterr().err.startswith(f"error: another process is writing {output};")
        assert not output.exists()
    assert cli.main(words) == 0
    assert (output / "model.safetensors").is_file()
    assert list(tmp_path.iterdir()) == [output]

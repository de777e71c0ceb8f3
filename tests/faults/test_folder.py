"""Of two processes that would write one folder, the second is refused and changes nothing."""

from pathlib import Path

import pytest

import cli
from foam_lightning.errors import BusyError
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.storage.run_identity import RunIdentity
from tests.faults.limits import files_up_to
from tests.support.runs import Finished
from tests.support.tiny import write_settings

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself


def test_a_run_folder_is_locked_by_one_process_at_a_time_for_all_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.open(tmp_path, "run", RunIdentity())
    with folder.lock():
        with pytest.raises(BusyError, match=r"another process trains in .*version_0"):
            folder.lock().__enter__()
        with RunFolder.open(tmp_path, "other", RunIdentity()).lock():
            pass
        monkeypatch.setenv("RANK", "1")
        with folder.lock():
            pass
    monkeypatch.undo()
    with folder.lock():
        pass


@pytest.mark.parametrize("budget", [(), ("--memory-budget", "24GB")], ids=["plain", "budget"])
def test_the_second_of_two_runs_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], budget: tuple[str, ...]
) -> None:
    words = ["fit", "--config", str(write_settings(tmp_path)), *budget]
    assert cli.main([*words[:3], "--name", "other"]) == 0  # which prepares the text
    with files_up_to(100_000):
        assert cli.main(words) == 5
    first = tmp_path / "runs" / "default" / "version_0"
    before = set(first.rglob("*"))
    capfd.readouterr()
    with RunFolder(first).lock():
        assert cli.main(words) == 6
    assert capfd.readouterr().err.startswith(f"error: another process trains in {first};")
    assert set(first.rglob("*")) == before


def test_an_export_to_a_folder_that_another_process_writes_is_refused(
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

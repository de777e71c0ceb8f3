"""A folder is whole or not there, whatever happens, and one process writes it."""

import errno
from pathlib import Path

import pytest

from foam_lightning.errors import BusyError, CheckpointError
from foam_lightning.signals import Interrupted
from foam_lightning.storage.atomic import write_folder
from tests.faults.limits import files_up_to


class SafetensorError(Exception):
    """As safetensors raises it."""


def write(folder: Path) -> None:
    (folder / "file").write_text("new" * 1000)


def content(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*"))


def test_what_was_there_is_replaced_by_all_parts(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")
    write_folder(folder, write, lambda path: (path / "other").mkdir())
    assert content(folder) == ["file", "other"]
    assert content(tmp_path) == ["out", "out/file", "out/other"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "out.part"
    (left / "deep").mkdir(parents=True)
    (left / "half").write_text("half")
    (left / ".lock").touch()
    write_folder(tmp_path / "out", write)
    assert content(tmp_path) == ["out", "out/file"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
    ids=["os", "safetensors"],
)
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, error: Exception) -> None:
    folder = tmp_path / "out"
    write_folder(folder, write)

    def fail(path: Path) -> None:
        (path / "half").write_text("half")
        raise error

    with pytest.raises(OSError, match="No space left on device") as caught:
        write_folder(folder, fail)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(folder))
    assert content(tmp_path) == ["out", "out/file"]


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path: Path) -> None:
    with files_up_to(100), pytest.raises(OSError, match="File too large"):
        write_folder(tmp_path / "out", write)
    assert content(tmp_path) == []


def test_a_place_that_is_no_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"^cannot write .*out: .*Not a directory"):
        write_folder(tmp_path / "file" / "out", write)


def test_an_error_of_another_kind_and_a_signal_leave_nothing(tmp_path: Path) -> None:
    for error in (ValueError("a fault"), Interrupted(2)):

        def fail(path: Path, error: BaseException = error) -> None:
            write(path)
            raise error

        with pytest.raises(type(error)):
            write_folder(tmp_path / "out", fail)
        assert content(tmp_path) == []


def test_a_second_process_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def write_twice(path: Path) -> None:
        write(path)
        with pytest.raises(BusyError, match=r"another process is writing .*out;") as caught:
            write_folder(folder, write)
        assert caught.value.exit_code == 6

    write_folder(folder, write_twice)
    assert content(tmp_path) == ["out", "out/file"]

"""A file or a folder is complete or as it was, whatever happens to the process that writes it."""

import errno
import os
import platform
import stat
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

from foam_lightning.errors import BusyError, CheckpointError
from foam_lightning.signals import Interrupted
from foam_lightning.storage.atomic import atomic_path, write_folder, write_text
from tests.faults.limits import files_up_to

NO_PROCESS = 4194305  # above the highest number of a process on Linux


class SafetensorError(Exception):
    """As safetensors raises it."""


def fill(folder: Path) -> None:
    (folder / "file").write_text("new" * 1000)


def write_file(path: Path) -> None:
    write_text(path, "new" * 1000)


def write_in_folder(path: Path) -> None:
    write_folder(path, fill)


def names(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*"))


def leave(path: Path, host: str, process: int, suffix: str = "") -> Path:
    """Leave what a process of a host was writing in the place of `path`."""
    left = path.with_name(f"{path.name}.{host}.{process}.0123abcd.part{suffix}")
    left.write_text("half")
    return left


def test_a_folder_is_replaced_by_all_parts(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    for _ in range(2):
        write_folder(folder, fill, lambda path: (path / "other").mkdir())
        (folder / "old").touch()
    write_folder(folder, fill)
    assert names(tmp_path) == ["deep", "deep/out", "deep/out/file"]


@pytest.mark.parametrize("write", [write_file, write_in_folder])
@pytest.mark.parametrize(
    "error", [OSError("killed here"), ValueError("a fault"), Interrupted(2)], ids=repr
)
def test_a_failure_leaves_what_was_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], None],
    error: BaseException,
) -> None:
    write(tmp_path / "out")
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise error
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises((type(error), CheckpointError)):
        write(tmp_path / "out")
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("write", [write_file, write_in_folder])
def test_a_full_disk_names_the_path_and_leaves_it_as_it_was(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    path = tmp_path / "out"
    for before in ([], ["out", "out/file"] if write is write_in_folder else ["out"]):
        with files_up_to(100), pytest.raises(OSError, match="File too large") as caught:
            write(path)
        assert caught.value.filename == str(path)
        assert names(tmp_path) == before
        write(path)


def test_a_full_disk_is_recognised_in_an_error_of_safetensors(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    with pytest.raises(OSError, match="No space left") as caught:
        write_folder(tmp_path / "out", fail)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "out"))
    assert names(tmp_path) == []


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*out"):
        write_in_folder(tmp_path / "file" / "out")


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path, host = tmp_path / "file.db", platform.node()
    for suffix in ("", "-journal", ".old"):
        leave(path, host, NO_PROCESS, suffix)
    kept = {
        leave(path, host, os.getppid()),
        leave(path, "another.host", NO_PROCESS),
        leave(tmp_path / "file.db.x", host, NO_PROCESS),
        path.with_name("file.db.part.txt"),
        path.with_name("file.db.parts"),
    }
    for other in kept:
        other.touch()
    write_text(path, "new")
    assert set(tmp_path.iterdir()) == {path, *kept}


def test_an_exclusive_writer_removes_what_any_machine_left(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    leave(folder, "another.host", 1)
    earlier_version = tmp_path / "out.part"
    (earlier_version / "deep").mkdir(parents=True)
    (earlier_version / ".lock").touch()
    write_folder(folder, fill)
    assert names(tmp_path) == ["out", "out/file"]


def test_several_writers_at_once_leave_the_content_of_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    texts = [str(number) * 100_000 for number in range(8)]
    threads = [Thread(target=write_text, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert names(tmp_path) == ["file"]


def test_a_second_writer_of_a_folder_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def write_twice(path: Path) -> None:
        fill(path)
        with pytest.raises(BusyError, match="another process is writing") as caught:
            write_in_folder(folder)
        assert caught.value.exit_code == 6

    write_folder(folder, write_twice)
    assert names(tmp_path) == ["out", "out/file"]


def test_a_folder_that_must_not_be_overwritten_stays(tmp_path: Path) -> None:
    write_in_folder(tmp_path / "out")
    with (
        pytest.raises(OSError, match="not empty"),
        atomic_path(tmp_path / "out", overwrite=False) as temporary,
    ):
        temporary.mkdir()
    assert names(tmp_path) == ["out", "out/file"]


def test_files_get_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    def private(folder: Path) -> None:
        (folder / "file").touch(0o600)

    before = os.umask(0o027)
    try:
        write_folder(tmp_path / "out", private)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out", tmp_path / "out" / "file")]
    assert modes == [0o750, 0o640]


def test_of_several_ranks_the_first_alone_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    write_file(tmp_path / "file")
    write_in_folder(tmp_path / "out")
    assert names(tmp_path) == []

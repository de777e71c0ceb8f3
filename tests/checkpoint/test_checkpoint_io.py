"""There is an intact checkpoint at every moment, and a damaged one is noticed."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.checkpoint.io import AtomicCheckpointIO, find_damage, previous_checkpoint
from foam_lightning.signals import Interrupted
from tests.faults.limits import files_up_to

NUMBERS = 5000
BOTH = ["last.ckpt", "previous.ckpt"]


def save(path: Path, *values: int) -> None:
    for value in values:
        content = {"weights": torch.full((NUMBERS,), float(value)), "step": value}
        AtomicCheckpointIO().save_checkpoint(content, path)


def steps(path: Path) -> list[int]:
    """Read the step of the previous checkpoint and of the last one."""
    return [torch.load(p, weights_only=True)["step"] for p in (previous_checkpoint(path), path)]


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("has_hard_links", [True, False])
def test_the_previous_checkpoint_is_kept_and_no_more(
    path: Path, monkeypatch: pytest.MonkeyPatch, has_hard_links: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not has_hard_links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    save(path, 1)
    assert names(path) == ["last.ckpt"]
    save(path, 2, 3)
    assert (names(path), steps(path)) == (BOTH, [2, 3])


def test_a_full_disk_leaves_both_as_they_were(path: Path) -> None:
    save(path, 1, 2)
    with files_up_to(8000), pytest.raises(OSError, match="File too large") as caught:
        save(path, 3)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert (names(path), steps(path)) == (BOTH, [1, 2])


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_a_signal_during_the_writing_leaves_an_intact_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save(path, 1, 2)

    def end(*_: object) -> None:
        raise Interrupted(15)

    monkeypatch.setattr(moment, end)
    with pytest.raises(Interrupted):
        save(path, 3)
    monkeypatch.undo()
    assert (names(path), steps(path)[1]) == (BOTH, 2)
    save(path, 4)
    assert (names(path), steps(path)) == (BOTH, [2, 4])


def test_a_file_that_is_cut_off_while_it_is_written_does_not_replace_the_last(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(path, 1, 2)
    written = torch.save

    def cut(content: Any, file: Any) -> None:
        written(content, file)
        file.truncate(file.tell() - 100)

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(OSError, match="truncated"):
        save(path, 3)
    assert (names(path), steps(path)) == (BOTH, [1, 2])


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("intact") / "last.ckpt"
    save(path, 1)
    return path


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_off_anywhere_is_damaged(intact: Path, share: float) -> None:
    assert find_damage(intact, thorough=False) is None
    cut = intact.with_name("cut.ckpt")
    all_bytes = intact.read_bytes()
    cut.write_bytes(all_bytes[: int(share * len(all_bytes))])
    assert "truncated" in str(find_damage(cut, thorough=False))


@given(place=st.integers(2000, 2000 + NUMBERS), bit=st.integers(0, 7))
def test_a_single_flipped_bit_is_found_which_torch_does_not(
    intact: Path, place: int, bit: int
) -> None:
    all_bytes = bytearray(intact.read_bytes())
    all_bytes[place] ^= 1 << bit
    damaged = intact.with_name("damaged.ckpt")
    damaged.write_bytes(all_bytes)
    assert find_damage(damaged, thorough=False) is None
    assert "checksum" in str(find_damage(damaged, thorough=True))
    assert torch.load(damaged, weights_only=True).keys() == {"weights", "step"}

"""There is a whole checkpoint at every moment, and a damaged one is noticed."""

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


def content(value: float) -> dict[str, Any]:
    return {"weights": torch.full((NUMBERS,), value), "step": int(value)}


def save(path: Path, *values: float) -> None:
    for value in values:
        AtomicCheckpointIO().save_checkpoint(content(value), path)


def value_in(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["step"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "last.ckpt"


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


def test_the_one_before_is_kept_and_no_more(path: Path) -> None:
    save(path, 1)
    assert names(path) == ["last.ckpt"]
    save(path, 2, 3)
    assert names(path) == ["last.ckpt", "previous.ckpt"]
    assert (value_in(previous_checkpoint(path)), value_in(path)) == (2, 3)


def test_a_file_system_without_hard_links_keeps_it_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    save(path, 1, 2)
    assert (value_in(previous_checkpoint(path)), value_in(path)) == (1, 2)
    assert names(path) == ["last.ckpt", "previous.ckpt"]


def test_a_disk_that_gets_full_leaves_both_as_they_were(path: Path) -> None:
    save(path, 1, 2)
    with files_up_to(8000), pytest.raises(OSError, match="File too large") as caught:
        save(path, 3)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == f"{path}.part"
    assert (value_in(previous_checkpoint(path)), value_in(path)) == (1, 2)
    assert names(path) == ["last.ckpt", "previous.ckpt"]


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_a_signal_while_it_is_written_leaves_a_whole_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save(path, 1, 2)

    def end(*_: object) -> None:
        raise Interrupted(15)

    monkeypatch.setattr(moment, end)
    with pytest.raises(Interrupted):
        save(path, 3)
    monkeypatch.undo()
    assert value_in(path) == 2
    assert "last.ckpt.part" not in names(path)
    save(path, 4)
    assert (value_in(previous_checkpoint(path)), value_in(path)) == (2, 4)
    assert names(path) == ["last.ckpt", "previous.ckpt"]


def test_a_file_that_is_cut_off_before_its_end_is_not_taken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(path, 1)
    written = torch.save

    def cut(content: Any, file: Any) -> None:
        written(content, file)
        file.truncate(file.tell() - 100)

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(OSError, match=r"was written and is truncated"):
        save(path, 2)
    assert (names(path), value_in(path)) == (["last.ckpt"], 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "last.ckpt"
    save(path, 1)
    return path


@given(share=st.floats(0, 1, exclude_max=True))
def test_what_is_cut_off_anywhere_has_a_flaw(whole: Path, share: float) -> None:
    assert find_damage(whole, thorough=False) is None
    cut = whole.with_name("cut.ckpt")
    all_bytes = whole.read_bytes()
    cut.write_bytes(all_bytes[: int(share * len(all_bytes))])
    assert find_damage(cut, thorough=False) == "truncated or no checkpoint"


@given(place=st.integers(2000, 2000 + NUMBERS), bit=st.integers(0, 7))
def test_a_single_bit_that_fell_over_is_found_which_torch_does_not(
    whole: Path, place: int, bit: int
) -> None:
    all_bytes = bytearray(whole.read_bytes())
    all_bytes[place] ^= 1 << bit
    damaged = whole.with_name("damaged.ckpt")
    damaged.write_bytes(all_bytes)
    assert find_damage(damaged, thorough=False) is None
    found = find_damage(damaged, thorough=True)
    assert found is not None
    assert found.startswith("damaged, as the checksum of its ")
    assert torch.load(damaged, weights_only=True).keys() == {"weights", "step"}

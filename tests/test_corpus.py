import sysconfig
from pathlib import Path

import pytest

from foam_lightning.data import sources as corpus
from foam_lightning.errors import DataError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    return tmp_path


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_the_standard_library_is_about_12_megabytes_sorted_and_without_tests() -> None:
    documents = list(corpus.documents())
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert 8e6 < sum(len(document.text) for document in documents) < 25e6
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "idle_test", "site-packages", "__pycache__"})


def test_about_5_percent_is_held_out() -> None:
    names = [document.name for document in corpus.documents()]
    share = sum(map(corpus.is_validation, names)) / len(names)
    assert 0.03 < share < 0.07


def test_the_split_of_a_file_never_changes() -> None:
    names = [f"module_{index}.py" for index in range(60)]
    assert [name for name in names if corpus.is_validation(name)] == [
        "module_14.py",
        "module_42.py",
    ]


def test_skips_what_is_not_source_text(library: Path) -> None:
    write(library / "kept.py", b"x = 1\n")
    write(library / "package" / "also_kept.py", b"y = 2\n")
    write(library / "latin.py", b"# caf\xe9\n")
    write(library / "blank.py", b"\n")
    write(library / "notes.txt", b"not code")
    for folder in (
        "test",
        "package/tests",
        "site-packages",
        "config-3.11-x86",
        "ensurepip/_bundled",
    ):
        write(library / folder / "left_out.py", b"z = 3\n")
    assert [tuple(document) for document in corpus.documents()] == [
        ("kept.py", "x = 1\n"),
        ("package/also_kept.py", "y = 2\n"),
    ]


def test_a_python_without_sources_is_named(library: Path) -> None:
    with pytest.raises(
        DataError, match=r"holds no \.py files; give your own text with data\.files"
    ):
        next(corpus.documents())

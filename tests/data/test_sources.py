import json
import os
import platform
import subprocess
import sysconfig
from pathlib import Path

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pytest
from pyarrow import parquet

from foam_lightning.data.cache import cache_folder, cached_table
from foam_lightning.data.records import list_files
from foam_lightning.data.sources import (
    is_held_out,
    open_dataset,
    open_default_corpus,
    open_files,
    python_library_documents,
)
from foam_lightning.errors import DataError


@pytest.fixture
def cache(tmp_path):
    return cache_folder(str(tmp_path / "cache"))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def jsonl(path, texts, column="text"):
    return write(path, "".join(json.dumps({column: text, "id": 1}) + "\n" for text in texts))


def read(files, cache, validation_files=None, text_column="text", **settings):
    held_out = None if validation_files is None else list_files(validation_files)
    return open_files(list_files(files), held_out, text_column, cache=cache, **settings)


def texts(dataset):
    return [document["text"] for document in dataset]


def test_the_default_corpus_has_both_splits():
    source = open_default_corpus()
    assert len(source.train) > 10 * len(source.validation) > 0
    assert list(source.train[0]) == list(source.validation[0]) == ["text"]
    assert open_default_corpus().fingerprint == source.fingerprint


def test_files_of_every_kind_are_read_in_the_order_given(tmp_path, cache):
    parquet.write_table(
        pa.table({"text": ["p1", None, "p2"], "n": [1, 2, 3]}), tmp_path / "a.parquet"
    )
    files = [
        jsonl(tmp_path / "b.jsonl", ["j1", "", "j2"]),
        str(tmp_path / "a.parquet"),
        write(tmp_path / "c.txt", "one\n\ndocument\n"),
    ]
    held_out = write(tmp_path / "v.txt", "held out")
    source = read(files, cache, validation_files=[held_out])
    assert texts(source.train) == ["j1", "j2", "p1", "p2", "one\n\ndocument\n"]
    assert texts(source.validation) == ["held out"]


def test_a_fraction_of_many_documents_is_held_out(tmp_path, cache):
    files = [jsonl(tmp_path / "a.jsonl", [f"document {index}" for index in range(60)])]
    source = read(files, cache)
    assert texts(source.validation) == ["document 10", "document 30", "document 50"]
    assert len(source.train) == 57


def test_the_end_of_each_of_a_few_documents_is_held_out(tmp_path, cache):
    text = "".join(chr(97 + index % 26) for index in range(1000))
    source = read([write(tmp_path / "a.txt", text)], cache)
    assert texts(source.train) == [text[:950]]
    assert texts(source.validation) == [text[950:]]


def test_the_second_reading_comes_from_the_cache_until_a_file_changes(tmp_path, cache):
    path = tmp_path / "a.txt"
    write(path, "first")
    first = read([str(path)], cache, validation_files=[str(path)])
    (arrow,) = cache.glob("*.arrow")
    written = arrow.stat().st_mtime_ns
    again = read([str(path)], cache, validation_files=[str(path)])
    assert arrow.stat().st_mtime_ns == written
    assert again.fingerprint == first.fingerprint
    write(path, "other")
    os.utime(path, ns=(1, 1))
    changed = read([str(path)], cache, validation_files=[str(path)])
    assert texts(changed.train) == ["other"]
    assert changed.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", " \n\n", "has no text"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 text (byte 0)"),
        ("a.txt", b"ab\0cd", "NUL bytes"),
        ("a.txt", None, "there is no file"),
        ("a.docx", "x,y", ".txt, .jsonl, .json, .csv, .parquet"),
        ("a.jsonl", '{"text": "x"}\n{"text": "y"\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\xff\xff\n', "line 2 is not JSON"),
        ("a.jsonl", '{"body": "x", "id": 3}\n', "no column 'text'; it has body, id;"),
        ("a.jsonl", '{"text": 5}\n', "line 1: 'text' is int"),
        ("a.jsonl", '"x"\n', "line 1 is not a JSON object"),
        ("a.jsonl", "\n\n", "has no text"),
        ("a.parquet", "no parquet at all", "not a valid Parquet file"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, cache, name, content, message):
    path = str(tmp_path / name) if content is None else write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read([path], cache)
    assert path in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("column", "message"), [("words", "'words'; it has text, n;"), ("n", "row 1: 'n' is int,")]
)
def test_a_parquet_column_without_text_is_named(tmp_path, cache, column, message):
    parquet.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read([str(tmp_path / "a.parquet")], cache, text_column=column)


def test_a_file_without_permission_is_named(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.txt", "secret")

    def refuse(*_args, **_settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"cannot read .*a\.txt \(Permission denied\)"):
        read([path], cache)


def test_a_cache_folder_that_cannot_be_created_is_named(tmp_path):
    write(tmp_path / "file", "in the way")
    with pytest.raises(DataError, match=r"cannot create the cache folder .*data\.cache_dir"):
        cache_folder(str(tmp_path / "file" / "cache"))


def test_the_cache_follows_xdg_cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "foam-lightning"


def test_a_failure_leaves_nothing_behind(cache):
    schema = pa.schema([("text", pa.large_string())])

    def batches():
        yield pa.record_batch([pa.array(["a"], pa.large_string())], schema=schema), 1
        raise DataError("half way")

    with pytest.raises(DataError, match="half way"):
        cached_table(cache / "a.arrow", schema, batches, content="text")
    assert not list(cache.iterdir())


def test_what_a_killed_process_left_half_written_is_cleared_and_written_again(cache):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left, running = (
        cache / f"a.arrow.{platform.node()}.{number}.0123abcd.part"
        for number in (gone.pid, os.getppid())
    )
    left.write_bytes(b"half")
    running.write_bytes(b"another process is at it")
    schema = pa.schema([("text", pa.large_string())])
    batch = pa.record_batch([pa.array(["a", "b"], pa.large_string())], schema=schema)
    dataset = cached_table(cache / "a.arrow", schema, lambda: [(batch, 2)], content="text")
    assert texts(dataset) == ["a", "b"]
    assert sorted(cache.iterdir()) == [cache / "a.arrow", running]


def test_long_writing_says_in_the_end_where_how_much_was_written(cache, monkeypatch, capsys):
    monkeypatch.setattr("foam_lightning.data.cache._QUIET_SECONDS", 0)
    schema = pa.schema([("text", pa.large_string())])
    batch = pa.record_batch([pa.array(["a" * 5000], pa.large_string())], schema=schema)
    cached_table(cache / "a.arrow", schema, lambda: [(batch, 1)], content="text")
    line = capsys.readouterr().err.splitlines()[-1]
    size = (cache / "a.arrow").stat().st_size
    assert float(line.split()[1]) * 1000 == pytest.approx(size, abs=16)  # the end mark comes last
    assert line.endswith(f"kB of text to {cache / 'a.arrow'}")


def test_text_goes_to_the_cache_in_chunks_however_much_there_is(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("foam_lightning.data.files._CHUNK_CHARACTERS", 100)
    source = read([jsonl(tmp_path / "a.jsonl", ["x" * 30] * 400)], cache)
    (path,) = cache.glob("*.arrow")
    sizes = [batch.num_rows for batch in pa.ipc.open_stream(path.read_bytes())]
    assert len(source.train) + len(source.validation) == 400
    assert max(sizes) <= 4


class Hub:
    """Stands in for datasets.load_dataset."""

    def __init__(self, splits):
        self.splits = splits
        self.calls = []

    def __call__(self, name, config, *, streaming):
        self.calls.append((name, config, streaming))
        found = {key: datasets.Dataset.from_dict(value) for key, value in self.splits.items()}
        if streaming:
            return {key: value.to_iterable_dataset() for key, value in found.items()}
        return datasets.DatasetDict(found)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_keeps_its_splits(monkeypatch, streaming):
    hub = Hub({name: {"body": [name], "url": ["u"]} for name in ("train", "validation", "test")})
    monkeypatch.setattr(datasets, "load_dataset", hub)
    source = open_dataset("some/text", "en", "body", streaming=streaming)
    assert hub.calls == [("some/text", "en", streaming)]
    assert list(source.train) == [{"text": "train"}]
    assert list(source.validation) == [{"text": "validation"}]
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    assert isinstance(source.train, kind)


def test_a_stream_may_learn_its_columns_late(tmp_path, monkeypatch):
    files = {name: jsonl(tmp_path / f"{name}.jsonl", [name]) for name in ("train", "validation")}
    stream = datasets.load_dataset("json", data_files=files, streaming=True)
    # What has been mapped may hold any columns.
    stream = {name: split.map(lambda document: document) for name, split in stream.items()}
    assert stream["train"].column_names is None
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_settings: stream)
    assert list(open_dataset("some/text", None, "text", streaming=True).train) == [
        {"text": "train"}
    ]
    with pytest.raises(DataError, match="has no column 'body'; it has text, id;"):
        open_dataset("some/text", None, "body", streaming=True)


TWO = {name: {"body": ["a"], "url": ["b"]} for name in ("train", "validation")}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": {"text": ["a"]}, "test": {"text": ["b"]}}, "'validation'; it has train, test;"),
        ({"validation": {"text": ["a"]}}, "no split 'train'; it has validation;"),
        (TWO, "no column 'text'; it has body, url;"),
    ],
)
def test_a_missing_split_or_column_is_named(monkeypatch, splits, message):
    monkeypatch.setattr(datasets, "load_dataset", Hub(splits))
    with pytest.raises(DataError, match=message):
        open_dataset("some/text", None, "text", streaming=False)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_split_is_named(monkeypatch, streaming):
    load = Hub({"train": {"text": ["a"]}, "validation": {"text": ["b"]}})
    splits = load("some/text", None, streaming=streaming)
    splits["validation"] = splits["validation"].filter(lambda _document: False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_settings: splits)
    with pytest.raises(DataError, match=r"'validation' .*'some/text' is empty"):
        open_dataset("some/text", None, "text", streaming=streaming)


def test_an_unknown_configuration_is_named(monkeypatch):
    def fail(*_args, **_settings):
        raise ValueError("BuilderConfig 'xx' not found. Available: ['en']\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"'xx' not found.*data\.dataset_config") as caught:
        open_dataset("some/text", "xx", "text", streaming=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_offline_the_error_is_one_line(monkeypatch, streaming):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot reach .*'allenai/c4'") as caught:
        open_dataset("allenai/c4", "en", "text", streaming=streaming)
    assert "\n" not in str(caught.value)


# ---- the default corpus


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    return tmp_path


def test_the_standard_library_is_about_12_megabytes_sorted_and_without_tests():
    documents = list(python_library_documents())
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert 8e6 < sum(len(document.text) for document in documents) < 25e6
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "idle_test", "site-packages", "__pycache__"})


def test_the_split_of_a_file_never_changes():
    names = [f"module_{index}.py" for index in range(60)]
    assert [name for name in names if is_held_out(name)] == ["module_14.py", "module_42.py"]


def test_files_without_source_text_are_skipped(library):
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
    assert [tuple(document) for document in python_library_documents()] == [
        ("kept.py", "x = 1\n"),
        ("package/also_kept.py", "y = 2\n"),
    ]


def test_a_python_without_sources_is_refused(library):
    with pytest.raises(DataError, match=r"no \.py files; set data\.files"):
        next(python_library_documents())

import json
import multiprocessing
import random
from collections import Counter
from functools import partial
from itertools import chain, islice
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from foam_lightning.data import streaming
from foam_lightning.data.files import list_shards, open_file_streams
from foam_lightning.data.loader import StreamLoader
from foam_lightning.data.packing import collate
from foam_lightning.data.records import list_files
from foam_lightning.data.streaming import StreamedRows, StreamedSource
from foam_lightning.data.table import Table
from foam_lightning.data.tokenizer import build_tokenizer
from foam_lightning.errors import ConfigError, DataError

TEXTS = [
    f"def name_{index}(value):\n    return value + {index}\n" * (1 + index % 4)
    for index in range(90)
]
LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    documents = Table.from_texts(TEXTS)
    cache = tmp_path_factory.mktemp("tokenizer")
    return build_tokenizer(None, vocab_size=300, documents=documents, cache=cache)


@pytest.fixture(params=["files", "hub"])
def shards(request, tmp_path):
    """Three shards, with about ten documents in a block."""
    request.getfixturevalue("small_blocks")
    if request.param == "hub":
        documents = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=3)
        return list(list_shards(documents, "some/text"))
    paths = [
        jsonl(tmp_path / "a.jsonl", TEXTS[:40]),
        jsonl(tmp_path / "b.jsonl", TEXTS[40:55]),
        str(tmp_path / "c.parquet"),
    ]
    table = pa.table({"text": TEXTS[55:]})
    parquet.write_table(table, paths[2], row_group_size=8)
    train, _, _ = open_file_streams(list_files(paths), list_files(paths), "text")
    return list(list_shards(train, "files"))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "_BLOCK_CHARACTERS", 1000)


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def streamed(tokenizer):
    def make(*sources, packing=True, **settings):
        shares = settings.pop("shares", [1.0])
        seed = settings.pop("seed", 0)
        return StreamedRows(
            [
                StreamedSource(
                    shards, tokenizer, sequence_length=LENGTH, packing=packing, seed=seed + index
                )
                for index, shards in enumerate(sources)
            ],
            shares,
            seed=seed,
            **settings,
        )

    return make


def load(rows, **settings):
    settings = {"batch_size": 4, "num_rows": 240, "num_workers": 0} | settings
    return StreamLoader(rows, partial(collate, sequence_length=LENGTH, pad=0), **settings)


def ids(rows):
    return [list(map(int, row["input_ids"])) for row in rows]


def first_pass(rows):
    (source,) = rows.sources
    taken = []
    for row in rows:
        if source.state_dict()["pass"]:
            return taken
        taken += ids([row])
    raise AssertionError("a stream has no end")


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_processes_read_every_document_once_in_a_pass(shards, streamed, tokenizer, world):
    padded = [
        first_pass(streamed(shards, packing=False, world=world, rank=rank)) for rank in range(world)
    ]
    found = Counter(tuple(row) for row in chain.from_iterable(padded))
    ends = [tokenizer.eos_token_id]
    expected = (tokenizer(text, add_special_tokens=False)["input_ids"] + ends for text in TEXTS)
    assert found == Counter(tuple(row[:LENGTH]) for row in expected)
    assert sum(found.values()) == len(TEXTS)


def test_blocks_and_passes_are_shuffled_by_the_seed(shards, streamed):
    rows = ids(islice(streamed(shards, packing=False), 2 * len(TEXTS)))
    first, second = rows[: len(TEXTS)], rows[len(TEXTS) :]
    other = ids(islice(streamed(shards, packing=False, seed=7), len(TEXTS)))
    assert len({str(order) for order in (first, second, other)}) == 3
    assert sorted(first) == sorted(second) == sorted(other)


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_resumes_exactly_at_every_row_and_across_passes(shards, streamed, packing):
    many = 300  # more than one pass
    running = streamed(shards, packing=packing)
    states, expected = [], []
    for row in islice(running, many):
        expected.append(row)
        states.append(json.loads(json.dumps(running.state_dict())))
    for done in range(1, many, 7):
        resumed = streamed(shards, packing=packing)
        resumed.load_state_dict(states[done - 1])
        assert resumed.state_dict() == states[done - 1]
        following = ids(islice(resumed, 20))
        assert following[: many - done] == ids(expected[done : done + 20])


def test_a_resumed_stream_starts_over_in_the_next_iteration(shards, streamed):
    rows = streamed(shards)
    first = ids(islice(rows, 40))
    list(islice(rows, 11))
    rows.load_state_dict(rows.state_dict())
    assert ids(islice(rows, 29)) == first[11:]
    assert ids(islice(rows, 40)) == first


def test_sources_are_mixed_by_their_shares_and_resume_exactly(shards, streamed):
    def make():
        return streamed(shards[:1], shards[1:], shares=[0.8, 0.2], packing=False)

    own = set(map(tuple, first_pass(streamed(shards[:1], packing=False))))
    running = make()
    expected = ids(islice(running, 500))
    state = running.state_dict()
    assert 360 < sum(tuple(row) in own for row in expected) < 440
    resumed = make()
    resumed.load_state_dict(state)
    assert ids(islice(resumed, 60)) == ids(islice(make(), 560))[500:]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_loader_resumes_exactly_after_any_batch(shards, streamed, num_workers):
    def loader(batch_size):
        rows = streamed(shards, shards[:1], shares=[0.7, 0.3])
        return load(rows, batch_size=batch_size, num_workers=num_workers)

    def rows(batches):
        return [row for batch in batches for row in batch["input_ids"].tolist()]

    kept = loader(4)
    whole = rows(kept)
    assert len(whole) == 240
    assert not multiprocessing.active_children()
    assert kept.state_dict()["rows"] == 240
    for done in random.Random(num_workers).sample(range(1, 60), 3):
        killed = loader(4)
        assert rows(islice(killed, done)) == whole[: 4 * done]
        state = json.loads(json.dumps(killed.state_dict()))
        for batch_size in (4, 2):  # a micro-batch does not change the order
            resumed = loader(batch_size)
            resumed.load_state_dict(state)
            assert rows(resumed) == whole[4 * done :], (done, batch_size)


def test_another_number_of_workers_is_refused(shards, streamed):
    with pytest.raises(DataError, match=r"num_workers 0 on 1 .* has 2 on 1"):
        load(streamed(shards), num_workers=2).load_state_dict(load(streamed(shards)).state_dict())


def test_one_worker_reads_the_same_as_none(shards, streamed):
    orders = [
        [batch["input_ids"].tolist() for batch in load(streamed(shards), num_workers=num_workers)]
        for num_workers in (0, 1)
    ]
    assert len(orders[0]) == 60
    assert orders[0] == orders[1]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("fault", ["gone", "broken"])
def test_a_file_that_breaks_while_streaming_is_named(
    tmp_path, streamed, small_blocks, num_workers, fault
):
    paths = [jsonl(tmp_path / f"{name}.jsonl", TEXTS[:30]) for name in "ab"]
    train, _, _ = open_file_streams(list_files(paths), None, "text")
    if fault == "gone":
        Path(paths[1]).unlink()
        message = r"cannot read .*b\.jsonl .No such file"
    else:
        with Path(paths[1]).open("a") as file:
            file.write('{"text": \n')
        message = "b.jsonl line 31 is not JSON"
    rows = streamed(list(train.shards))
    with pytest.raises(DataError, match=message) as caught:
        list(load(rows, batch_size=1, num_rows=1000, num_workers=num_workers))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_of_the_hub_is_named(tmp_path, streamed, small_blocks):
    paths = [jsonl(tmp_path / f"{name}.jsonl", TEXTS) for name in "ab"]
    documents = datasets.load_dataset("json", data_files=paths, streaming=True, split="train")
    rows = streamed(list(list_shards(documents, "some/text")))
    Path(paths[1]).unlink()
    error = next(item for item in rows if isinstance(item, DataError))
    assert "cannot read shard 2 of 2 of some/text" in str(error)
    assert "\n" not in str(error)


def test_files_hold_out_every_twentieth_document(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [f"document {index}" for index in range(60)])
    train, validation, fingerprint = open_file_streams(list_files(path), None, "text")
    held_out = [document["text"] for document in validation]
    assert held_out == ["document 10", "document 30", "document 50"]
    assert len(list(train)) == 57
    assert fingerprint == open_file_streams(list_files(path), None, "text")[2]


def test_a_txt_file_needs_validation_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a document")
    with pytest.raises(ConfigError, match=r"a\.txt .*validation_files"):
        open_file_streams([path], None, "text")
    train, validation, _ = open_file_streams([path], [path], "text")
    assert list(train) == list(validation) == [{"text": "a document"}]


def test_a_stream_too_short_for_a_row_ends_with_an_error(streamed):
    nothing = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset().filter(lambda _: False)
    (error,) = streamed(list(list_shards(nothing, "")))
    assert "shorter than one sequence" in str(error)

from itertools import chain

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.data import packing
from foam_lightning.data.packing import (
    Packer,
    collate,
    evenly_spaced,
    packed_dataset,
    packed_rows,
    rows_in_whole_batches,
)
from foam_lightning.data.table import Table
from foam_lightning.data.tokenizer import Piece, build_tokenizer, encode, end_of_text_id
from foam_lightning.errors import DataError

TEXTS = [
    f"def name_{index}(value):\n    return value + {index}\n" * (index % 4) for index in range(90)
]
EOS = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    documents = Table.from_texts(TEXTS)
    cache = tmp_path_factory.mktemp("tokenizer")
    return build_tokenizer(None, vocab_size=300, documents=documents, cache=cache)


def pack(documents, length, *, packing):
    """Pack documents, each given as its pieces."""
    packer = Packer(length, EOS, packing=packing)
    rows = []
    for document in documents:
        for index, ids in enumerate(document):
            packer.add(Piece(ids, starts=index == 0, ends=index == len(document) - 1))
        rows += packer.rows()
    return rows


def joined(parts):
    return list(chain.from_iterable(parts))


def flow(tokenizer, texts):
    return [
        token
        for text in texts
        for piece in encode(tokenizer, [text])
        for token in [*piece.ids, end_of_text_id(tokenizer)]
    ]


tokens = st.integers(min_value=1, max_value=99)
documents_of_pieces = st.lists(
    st.lists(st.lists(tokens, max_size=9), min_size=1, max_size=3), max_size=9
)


@given(documents_of_pieces, st.integers(min_value=1, max_value=7))
def test_packed_rows_are_the_tokens_without_an_incomplete_last_row(documents, length):
    flowing = [token for document in documents for token in [*joined(document), EOS]]
    rows = pack(documents, length, packing=True)
    assert all(len(row) == length for row in rows)
    assert joined(rows) == flowing[: len(flowing) // length * length]


@given(documents_of_pieces, st.integers(min_value=1, max_value=7))
def test_unpacked_rows_are_the_truncated_documents(documents, length):
    rows = pack(documents, length, packing=False)
    assert rows == [[*joined(document), EOS][:length] for document in documents]


@pytest.mark.parametrize("at_once", [1, 7, 256])
def test_rows_continue_across_batches_of_documents(tokenizer, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(packing, "_DOCUMENTS_PER_BATCH", at_once)
    rows = packed(tokenizer, tmp_path, sequence_length=16)
    expected = flow(tokenizer, TEXTS)
    assert len(rows) == len(expected) // 16 > 100
    assert [token for row in rows for token in row["input_ids"]] == expected[: len(rows) * 16]


def packed(tokenizer, cache, **settings):
    settings = {"fingerprint": "f", "sequence_length": 16, "packing": True} | settings
    documents = Table.from_texts(TEXTS)
    return packed_dataset(documents, tokenizer=tokenizer, cache=cache, **settings)


def token_lists(rows):
    return [row["input_ids"].tolist() for row in rows]


def test_one_row_per_document_without_packing(tokenizer, tmp_path):
    rows = packed(tokenizer, tmp_path, packing=False)
    assert len(rows) == len(TEXTS)
    assert all(1 <= len(row["input_ids"]) <= 16 for row in rows)


def test_rows_are_written_once(tokenizer, tmp_path, monkeypatch):
    first = packed(tokenizer, tmp_path)
    monkeypatch.setattr(packing, "encode", None)  # a call would fail
    assert token_lists(packed(tokenizer, tmp_path)) == token_lists(first)


def test_rows_of_other_settings_are_cached_separately(tokenizer, tmp_path):
    documents = Table.from_texts(TEXTS)
    other = build_tokenizer(None, vocab_size=270, documents=documents, cache=tmp_path)
    packed(tokenizer, tmp_path)
    packed(other, tmp_path)
    for change in ({"fingerprint": "g"}, {"sequence_length": 8}, {"packing": False}):
        packed(tokenizer, tmp_path, **change)
    assert len(list(tmp_path.glob("rows-*.arrow"))) == 5


def test_labels_are_the_tokens_except_padding():
    batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}], sequence_length=3, pad=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_the_number_of_rows_is_rounded_down_to_whole_batches():
    assert rows_in_whole_batches(10, 4, 1) == 8
    with pytest.raises(DataError, match=r"10 sequences of 1 tokens.* batch of 11"):
        rows_in_whole_batches(10, 11, 1)


@given(st.data())
def test_evenly_spaced_positions_are_distinct_and_inside(data):
    total = data.draw(st.integers(min_value=1, max_value=500))
    count = data.draw(st.integers(min_value=1, max_value=total))
    chosen = evenly_spaced(count, total)
    assert len(set(chosen)) == count
    assert 0 <= min(chosen) <= max(chosen) < total


def test_a_stream_packs_to_the_same_rows_as_the_whole_split(tokenizer, tmp_path):
    whole = packed(tokenizer, tmp_path)
    stream = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=3)
    rows = packed_rows(stream, tokenizer, sequence_length=16, packing=True)
    assert [row["input_ids"] for row in rows] == token_lists(whole)

import pickle

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.data.table import Table

TYPES = pa.schema([("input_ids", pa.list_(pa.int32())), ("length", pa.int32())])


def write(path, rows, rows_in_a_batch=2):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, TYPES) as writer:
        for start in range(0, len(rows), rows_in_a_batch):
            part = rows[start : start + rows_in_a_batch]
            lists = {"input_ids": part, "length": [len(row) for row in part]}
            writer.write_table(pa.table(lists, schema=TYPES))
    return path


def token_lists(table):
    return [row["input_ids"].tolist() for row in table]


ROWS = [[1], [2, 3], [], [4], [5, 6, 7]]


@pytest.fixture
def table(tmp_path):
    return Table([write(tmp_path / "rows.arrow", ROWS)])


def test_rows_of_all_batches_are_found_by_index(table):
    assert len(table) == 5
    assert token_lists(table) == ROWS
    assert table[-1]["length"] == 3
    with pytest.raises(IndexError):
        table[5]


def test_a_row_can_be_changed_without_changing_the_file(table):
    table[0]["input_ids"][0] = 9
    assert token_lists(table) == ROWS


@given(st.lists(st.integers(0, 4)), st.data())
def test_a_selection_of_a_selection(tmp_path_factory, indices, data):
    table = Table([write(tmp_path_factory.mktemp("rows") / "rows.arrow", ROWS)])
    again = data.draw(st.lists(st.integers(0, len(indices) - 1)) if indices else st.just([]))
    chosen = table.select(indices).select(again)
    assert token_lists(chosen) == [ROWS[indices[index]] for index in again]
    assert chosen.column("length").tolist() == [len(row) for row in token_lists(chosen)]


def test_tables_one_after_the_other_keep_their_selections(tmp_path, table):
    other = Table([write(tmp_path / "other.arrow", [[8], [9]])])
    both = Table.concatenate([table.select([4, 0]), other.select(range(1, 2))])
    assert token_lists(both) == [[5, 6, 7], [1], [9]]


def test_columns_come_in_batches(table):
    assert [part["length"] for part in table.iter(2)] == [[1, 2], [0, 1], [3]]
    assert list(table.select([]).iter(2)) == []


def test_a_pickled_table_maps_the_file_again(tmp_path):
    table = Table([write(tmp_path / "rows.arrow", [[number] * 100 for number in range(1000)])])
    pickled = pickle.dumps(table.select(range(10)))
    assert len(pickled) < 2000
    assert token_lists(pickle.loads(pickled)) == [[number] * 100 for number in range(10)]


@pytest.mark.parametrize("size", [0, 10, 300])
def test_a_file_that_was_cut_off_is_refused(tmp_path, size):
    path = write(tmp_path / "rows.arrow", ROWS)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises((pa.ArrowException, OSError)):
        Table([path])

"""Files as they come: packed, in folders, by pattern, of text or of token ids."""

import bz2
import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from foam_lightning.data.files import read_documents
from foam_lightning.data.module import TextData
from foam_lightning.data.records import list_files, read_records
from foam_lightning.errors import DataError
from tests.support.pretrained import load_tokenizer, save_tokenizer
from tuner.config.parser import parse

TEXTS = ['first "quoted", with\na second line', "zweitens: Übung"]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zstd(content):
    return bytes(pa.compress(content, "zstd", asbytes=True))


LINES = "".join(f"{json.dumps({'text': text})}\n" for text in TEXTS)
ARRAY = json.dumps([{"text": text, "id": 1} for text in TEXTS], indent=1)
CSV = 'id,text\r\n1,"first ""quoted"", with\na second line"\r\n2,zweitens: Übung\r\n'
FORMS = {
    "lines": ("a.jsonl", LINES),
    "lines with a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
    "an array of lines": ("a.jsonl", f"\n {ARRAY}"),
    "lines in .json": ("a.json", LINES),
    "an array": ("a.json", ARRAY),
    "CSV": ("a.csv", CSV),
    "CSV of a spreadsheet": ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
    "capitals": ("A.JSONL", LINES),
    "gzip": ("a.jsonl.gz", gzip.compress(LINES.encode())),
    "gzip in two parts": ("a.JSON.GZ", gzip.compress(b" " + LINES[:9].encode())
                          + gzip.compress(LINES[9:].encode())),
    "packed CSV": ("a.csv.gz", gzip.compress(CSV.encode())),
    "Zstandard": ("a.jsonl.zst", zstd(LINES.encode())),
    "Zstandard in two parts": ("a.json.zst", zstd(ARRAY[:9].encode()) + zstd(ARRAY[9:].encode())),
}  # fmt: skip


def texts(path):
    return [
        document for file in list_files(str(path)) for _, document in read_documents(file, "text")
    ]


@pytest.mark.parametrize("kind", FORMS)
def test_a_file_is_read_as_it_comes(kind, tmp_path):
    name, content = FORMS[kind]
    path = write(tmp_path / name, content)
    assert texts(path) == TEXTS
    positions = [record.number for record in read_records(path)]
    assert [text for _, text in read_documents(path, "text", positions[0])] == TEXTS[1:]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.TXT.zst"])
def test_a_packed_text_is_one_document(name, tmp_path):
    pack = gzip.compress if name.endswith("gz") else zstd
    assert texts(write(tmp_path / name, pack(b"one\r\ntext\n"))) == ["one\ntext\n"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS, pa.large_string()),
        pa.array([text.encode() for text in TEXTS], pa.binary()),
        pa.array([text.encode() for text in TEXTS], pa.large_binary()),
    ],
    ids=lambda column: str(column.type).split("<")[0],
)
def test_texts_of_every_type_of_parquet(column, tmp_path):
    table = pa.table({"text": pa.chunked_array([column, column[:0]])})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == TEXTS


def test_folders_and_patterns_are_read_in_order_of_the_names(tmp_path, capsys, monkeypatch):
    for name in ("b/2.txt", "b/10.TXT", "a.jsonl", ".hidden.txt", "b/.git/x.txt"):
        write(tmp_path / "texts" / name, LINES if name == "a.jsonl" else name)
    write(tmp_path / "texts" / "README.md", "left out")
    found = [file.relative_to(tmp_path / "texts") for file in list_files(str(tmp_path / "texts"))]
    assert list(map(str, found)) == ["a.jsonl", "b/10.TXT", "b/2.txt"]
    assert "3 files are read, 1 of other kinds left out (.md)" in capsys.readouterr().err
    assert texts(tmp_path / "texts" / "*" / "*.txt") == ["b/2.txt"]
    assert texts(tmp_path / "texts" / "**" / "*.[tT]*") == ["b/10.TXT", "b/2.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/texts/b/2.txt") == ["b/2.txt"]
    write(tmp_path / "odd[1].txt", "a name like a pattern")
    assert texts(tmp_path / "odd[1].txt") == ["a name like a pattern"]


BAD = {
    "gzip that is none": ("a.txt.gz", "words", "cannot read"),
    "gzip cut off": ("a.txt.gz", gzip.compress(b"words " * 99)[:-9], "cannot read"),
    "gzip damaged": ("a.txt.gz", gzip.compress(b"words")[:12] + b"\xff" * 9, "cannot read"),
    "Zstandard that is none": ("a.txt.zst", "words", "cannot read"),
    "Zstandard cut off": ("a.jsonl.zst", zstd(LINES.encode())[:-5], "cannot read"),
    "another packer": ("a.txt.bz2", bz2.compress(b"words"), ".gz or .zst"),
    "packed Parquet": ("a.parquet.gz", gzip.compress(b"PAR1"), ".gz or .zst"),
    "an array cut off": ("a.json", ARRAY[:-9], "is not JSON"),
    "an array of texts": ("a.json", '["words"]', "item 1 is not a JSON object"),
    "an object of several lines": ("a.json", '{\n"data": []}', "line 1 is not JSON"),
    "CSV without the column": ("a.csv", "body\nwords\n", "it has body"),
    "CSV with too few fields": ("a.csv", "id,text\n1\n", "line 2"),
    "CSV with too many fields": ("a.csv", "id,text\n1,a,b\n", "line 2"),
    "CSV with an open quote": ("a.csv", 'text\n"words\n', "not CSV"),
    "CSV of Latin-1": ("a.csv", "text\nÜbung\n".encode("latin-1"), "not CSV"),
    "CSV without a row": ("a.csv", "text\n", "has no text"),
    "a folder of nothing to read": ("folder/a.md", "words", "no file to read"),
    "words for tokens": ("a.jsonl", '{"text": ["words"]}', "not of token ids"),
    "negative tokens": ("a.jsonl", '{"input_ids": [-1]}', "not of token ids"),
    "tokens as text": ("a.csv", 'input_ids\n"[1, 2]"\n', "not a list of token ids"),
    "huge tokens": ("a.jsonl", '{"input_ids": [4294967296]}', "not of token ids"),
    "tokens with labels": ("a.jsonl", '{"input_ids": [1, 2], "labels": [-100, 2]}', "data.chat"),
    "a mask of another length": ("a.jsonl", '{"input_ids": [1], "attention_mask": []}', "as long"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_in_one_line(kind, tmp_path):
    name, content, says = BAD[kind]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        texts(path.parent if "folder" in name else path)
    assert str(tmp_path) in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pattern_without_a_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no file matches .*\*\.txt"):
        list_files([str(tmp_path / "*.txt")])


def test_binary_text_that_is_no_utf8_is_named(tmp_path):
    parquet.write_table(pa.table({"text": [b"good", b"\xff"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2: 'text' is not UTF-8"):
        texts(tmp_path / "a.parquet")


# ---- token ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, template=None)
    return folder


def tokenized(folder, count=60):
    tokenizer = load_tokenizer(folder)
    return [tokenizer(f"{i} is a number\n")["input_ids"] for i in range(count)]


def rows(data):
    data.setup()
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    return sorted(tuple(row.tolist()) for batch in batches for row in batch["input_ids"])


@pytest.mark.parametrize("streaming", [False, True])
def test_token_ids_are_the_rows_that_their_text_has(streaming, folder, tmp_path):
    end, pad = 1, 5
    ids = tokenized(folder)
    records = [
        {"input_ids": [*own, end, pad], "attention_mask": [1] * (len(own) + 1) + [0]} for own in ids
    ]
    parquet.write_table(pa.table({"input_ids": ids}), tmp_path / "ids.parquet")
    write(tmp_path / "ids.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))
    lines = (json.dumps({"text": f"{i} is a number\n"}) for i in range(60))
    write(tmp_path / "text.jsonl", "".join(f"{line}\n" for line in lines))
    found = []
    for name in ("text.jsonl", "ids.jsonl", "ids.parquet"):
        data = TextData(
            files=str(tmp_path / name), tokenizer=str(folder), vocab_size=320, batch_size=4,
            sequence_length=16, streaming=streaming, cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        data.stream_rows = 20
        found.append(rows(data))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("token", "own", "says"),
    [(320, True, "token id 320, .*up to 319"), (5, False, r"set data\.tokenizer")],
)
def test_token_ids_need_the_tokenizer_that_made_them(token, own, says, folder, tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"input_ids": [token] * 999}))
    data = TextData(
        files=[str(path)], tokenizer=str(folder) if own else None, vocab_size=320,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    with pytest.raises(DataError, match=says):
        data.setup()


# ---- the setting


@pytest.mark.parametrize(
    "words",
    [
        ["--data.files", "a.txt", "b.txt"],
        ["--data.files=a.txt", "b.txt"],
        ["--data.files=[a.txt, b.txt]"],
        ["--data.files", '["a.txt", "b.txt"]'],
    ],
    ids=" ".join,
)
def test_files_are_given_in_several_ways(words):
    assert parse("fit", words, default=None).data.files == ["a.txt", "b.txt"]


@pytest.mark.parametrize("yaml", ["a.txt", "[a.txt]"])
def test_a_single_file_is_a_list_of_one(yaml, tmp_path):
    config = write(tmp_path / "c.yaml", f"data: {{files: {yaml}, validation_files: {yaml}}}")
    settings = parse("fit", ["--config", str(config)], default=None)
    words = ["--data.files=a.txt", "--data.validation_files", "a.txt"]
    again = parse("fit", words, default=None)
    assert settings.text == again.text
    assert settings.data.files == settings.data.validation_files == ["a.txt"]

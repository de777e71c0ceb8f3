"""Files to train on, and sources of them."""

from pathlib import Path

from tests.bad_input.case import Case, Content, reading


def _data(name: str, file: str, content: Content | None, says: str, words: str = "") -> Case:
    files = {} if content is None else {file: content}
    return reading(f"data: {name}", f"--data.files {{at}}/{file} {words}", says, files=files)


def _parquet(at: Path, _good: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["words " * 200] * 50}), at / "bad.parquet")
    whole = (at / "bad.parquet").read_bytes()
    (at / "bad.parquet").write_bytes(whole[: len(whole) // 2])


def _numbers(at: Path, _good: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": [1, 2]}), at / "bad.parquet")


def _damaged(at: Path, _good: Path) -> None:
    """Overwrite the middle of a Parquet file, whose end is where readers look first."""
    _parquet(at, _good)
    import pyarrow as pa
    from pyarrow import parquet

    texts = [f"{i} and {i * i}" * 40 for i in range(200)]
    parquet.write_table(pa.table({"text": texts}), at / "bad.parquet", compression="NONE")
    content = bytearray((at / "bad.parquet").read_bytes())
    content[4:2000] = b"\xff" * 1996
    (at / "bad.parquet").write_bytes(bytes(content))


_LINE = '{"text": "words"}\n'
_CHAT = "--data.chat true --data.tokenizer {good}/pretrained --model.vocab_size 328"
DATA = [
    _data("missing", "missing.txt", None, "there is no file"),
    _data("empty", "empty.txt", "", "is empty"),
    _data("blank", "blank.txt", " \n\t\n", "only whitespace"),
    _data("short", "short.txt", "x = 1\n", "short"),
    _data("binary", "binary.txt", bytes(range(256)) * 10, "not UTF-8"),
    _data("Latin-1", "latin.txt", "café " .encode("latin-1") * 1000, "byte 3"),
    _data("NUL bytes", "nul.txt", b"a\0b" * 100, "NUL bytes"),
    _data("a folder", "folder.txt/inside", "x", "x"),
    _data("another kind", "text.docx", "x", ".docx"),
    _data("no extension", "text", "x", "its extension"),
    _data("a line that is broken", "b.jsonl", _LINE + '{"text": "wo', "line 2"),
    _data("a line that is a list", "l.jsonl", _LINE * 2 + "[1]\n", "line 3"),
    _data("a line without text", "n.jsonl", '{"body": "words"}\n', "it has body"),
    _data("text that is a number", "t.jsonl", '{"text": 1}\n', "is int"),
    _data("text that is null", "u.jsonl", '{"text": null}\n', "NoneType"),
    _data("a line of Latin-1", "i.jsonl", '{"text": "é"}'.encode("latin-1"), "line 1"),
    _data("half a surrogate", "s.jsonl", '{"text": "\\ud800 words"}\n' * 500, "surrogate"),
    _data("deep JSON", "d.jsonl", '{"text": ' + "[" * 100_000, "line 1"),
    _data("5000 digits in JSON", "5.jsonl", '{"text": ' + "1" * 5000 + "}", "line 1"),
    _data("an array cut off", "a.json", '[{"text": "words"}', "not JSON"),
    _data("gzip that is none", "g.txt.gz", "words", "cannot read"),
    _data("Zstandard that is none", "z.jsonl.zst", "words", "cannot read"),
    _data("another packer", "t.txt.xz", "words", ".gz or .zst"),
    _data("CSV without the column", "c.csv", "a,b\n1,2\n", "it has a, b"),
    _data("CSV with an open quote", "q.csv", 'text\n"words\n', "not CSV"),
    _data("a pattern of nothing", "*.txt", None, "no file matches"),
    _data("a folder of nothing", "f/text.docx", "x", "no file to read", "--data.files={at}/f"),
    _data("token ids without a tokenizer", "i.jsonl", '{"input_ids": [1, 2]}\n' * 99,
          "set data.tokenizer"),
    _data("token ids of another tokenizer", "i.jsonl", '{"input_ids": [1, 9999]}\n' * 99,
          "token id 9999", "--data.tokenizer {good}/run/tokenizer"),
    _data("text as Parquet", "t.parquet", "words", "not a valid Parquet file"),
    reading("data: Parquet cut off", "--data.files {at}/bad.parquet", "Parquet", prepare=_parquet),
    reading("data: damaged Parquet", "--data.files {at}/bad.parquet", "cannot read",
             prepare=_damaged),
    reading("data: Parquet of numbers", "--data.files {at}/bad.parquet", "is int,",
             prepare=_numbers),
    reading("data: a column that is not there", "--data.files {at}/t.jsonl "
             "--data.text_column body",
         "'body'", files={"t.jsonl": _LINE}),
    reading("data: an empty path", "--data.files=", "empty path"),
    Case("data: fit on the home of nobody", "fit --config {good}/tiny.yaml "
         "--data.files=~no-such-user/x.txt", "there is no file"),
    reading("data: the home of nobody", "--data.files=~no-such-user/x.txt", "there is no file"),
    reading("data: no file", "--data.files []", "data.files is empty"),
    reading("data: validation alone", "--data.files null --data.validation_files a.txt",
         "without data.files"),
    reading("data: validation missing", "--data.validation_files {at}/no.txt", "there is no file"),
    reading("data: validation empty", "--data.validation_files {at}/no.txt", "is empty",
         files={"no.txt": ""}),
    reading("data: no validation rows", "--data.validation_sequences 0", "validation_sequences"),
    reading("data: more rows than text", "--data.batch_size 100000", "batch_size"),
    reading("data: rows longer than text", "--data.sequence_length 1000000", "short"),
    reading("data: a vocabulary too small", "--model.vocab_size 100", "too small"),
    reading("data: streaming nothing", "--data.files null --data.streaming true",
             "nothing to read"),
    reading("data: files and a dataset", "--data.dataset x/y", "remove one"),
    reading("data: micro-batches that do not divide", "--data.micro_batch_size 3", "divide"),
    reading("data: a cache that is a file", "--data.cache_dir {at}/f", "cache", files={"f": "x"}),
    reading("data: workers", "--data.num_workers -1", "num_workers"),
    reading("data: chat that is text", f"--data.files {{good}}/text.txt {_CHAT}", "it is text"),
    reading("data: chat without a tokenizer", "--data.chat true", "a tokenizer"),
    reading("data: chat with a broken line", f"--data.files {{at}}/c.jsonl {_CHAT}", "line 1",
         files={"c.jsonl": "{"}),
    reading("data: chat without an answer", f"--data.files {{at}}/c.jsonl {_CHAT}", "assistant",
         files={"c.jsonl": '{"messages": [{"role": "user", "content": "hi"}]}'}),
    reading("data: too few chats", f"--data.files {{at}}/c.jsonl {_CHAT}", "too few",
            files={"c.jsonl": '{"prompt": "a", "response": "b"}\n' * 10}),
    reading("data: chat in an unknown form", f"--data.files {{at}}/c.jsonl {_CHAT}", "in one form",
            files={"c.jsonl": '{"question": "a", "answer": "b"}\n' * 60}),
    reading("data: chat in two forms", f"--data.files {{at}}/c.jsonl {_CHAT}", "line 2",
            files={"c.jsonl": '{"prompt": "a", "response": "b"}\n'
                   '{"instruction": "a", "output": "b"}\n'}),
    reading("data: chat with half a weight", f"--data.files {{at}}/c.jsonl {_CHAT}", "weight 0.5",
            files={"c.jsonl": '{"messages": [{"role": "user", "content": "hi"}, '
                   '{"role": "assistant", "content": "ho", "weight": 0.5}]}\n'}),
    reading("data: chat with an image", f"--data.files {{at}}/c.json {_CHAT}", "'image'",
            files={"c.json": '[{"prompt": [{"role": "user", "content": [{"type": "image"}]}], '
                   '"completion": [{"role": "assistant", "content": "ho"}]}]'}),
    reading("data: chat of tokens of another tokenizer", f"--data.files {{at}}/c.jsonl {_CHAT}",
            "token id 9999", files={"c.jsonl": '{"input_ids": [9999], "labels": [9999]}\n' * 60}),
    reading("data: a chat as text", "--data.files {at}/c.jsonl", "set data.chat true",
            files={"c.jsonl": '{"prompt": "a", "response": "b"}\n'}),
    reading("data: chat with a number", f"--data.files {{at}}/c.jsonl {_CHAT}", "has no text",
         files={"c.jsonl": '{"prompt": "hi", "response": 1}'}),
    reading("data: chat of an unknown role", f"--data.files {{at}}/c.jsonl {_CHAT}", "line 1",
         files={"c.jsonl": '{"messages": [{"role": ["x"], "content": "hi"}]}'}),
] + [
    reading(f"sources {name}", "--data.files null", says, more=(f"--data.sources={text}",))
    for name, text, says in [
        ("empty", "[]", "data.sources is empty"),
        ("a mapping", "{}", "data.sources"),
        ("a word", "text.txt", "data.sources"),
        ("a list of words", "[a.txt]", "data.sources"),
        ("an unknown key", '[{"file": "a.txt", "weight": 1}]', "'file'"),
        ("no weight", '[{"files": ["a.txt"]}]', "weight"),
        ("weight 0", '[{"files": ["a.txt"], "weight": 0}]', "weight"),
        ("a negative weight", '[{"files": ["a.txt"], "weight": -1}]', "weight"),
        ("weight NaN", '[{"files": ["a.txt"], "weight": .nan}]', "weight"),
        ("weight true", '[{"files": ["a.txt"], "weight": true}]', "weight"),
        ("a huge weight", '[{"files": ["a.txt"], "weight": 1' + "0" * 400 + "}]", "weight"),
        ("files of a word", '[{"files": "a.txt", "weight": 1}]', "there is no file a.txt"),
        ("files of an empty word", '[{"files": "", "weight": 1}]', "files is empty"),
        ("files of numbers", '[{"files": [1], "weight": 1}]', "list of paths"),
        ("neither", '[{"weight": 1}]', "neither"),
        ("both", '[{"files": ["a.txt"], "dataset": "x", "weight": 1}]', "remove one"),
        ("a column of a list", '[{"files": ["a.txt"], "text_column": [1], "weight": 1}]',
         "text_column"),
        ("a dataset of a number", '[{"dataset": 1, "weight": 1}]', "dataset"),
        ("a missing file", '[{"files": ["a.txt"], "weight": 1}]', "there is no file"),
        ("a class", '[{"files": {"class_path": "hacked.C"}, "weight": 1}]', "list of paths"),
        ("a cycle", "[&a {files: [*a], weight: 1}]", "data.sources"),
    ]
]  # fmt: skip

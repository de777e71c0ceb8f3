"""What is refused before a run folder is opened: one line, exit code 2, and nothing is left."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import cli
from tests.support.tiny import write_settings
from tuner.config.parser import parse

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself

Refused = Callable[..., str]
ROWS = "".join(json.dumps({"text": f"{i} and {i} more. " * 9}) + "\n" for i in range(60))


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Give the one line that a command with tiny settings ends in."""
    settings = write_settings(tmp_path)

    def check(command: str, *words: str | Path) -> str:
        assert cli.main([command, "--config", str(settings), *map(str, words)]) == 2
        said = capfd.readouterr()
        assert "Traceback" not in said.out + said.err
        (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert not (tmp_path / "runs").exists()
        return line

    return check


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        ("generate", "--max_new_tokens", "0"),
        ("generate", "--temperature", "-1"),
        ("generate", "--temperature", "nan"),
        ("fit", "--tune.trials", "0"),
        ("fit", "--tune.fraction", "-.1"),
        ("compare", "--steps", "0"),
        ("compare", "--seeds", "0"),
        ("compare", "--optimizers", "foam,sgdx"),
    ],
)
def test_numbers_out_of_range_are_refused(
    command: str, flag: str, value: str, refused: Refused
) -> None:
    words = ["--ckpt_path", "x.ckpt"] if command == "generate" else []
    line = refused(command, *words, f"{flag}={value}")
    assert flag.lstrip("-") in line or value.split(",")[-1] in line


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.txt", None, "missing.txt"),
        ("empty.txt", b"", "empty"),
        ("short.txt", b"x = 1\n", "shorter"),
        ("garbage.txt", bytes(range(256)) * 10, "text"),
        ("other.jsonl", b'{"body": "no text here"}\n', "body"),
        ("text.docx", b"abc", ".docx"),
    ],
)
def test_bad_data_is_one_line(
    name: str,
    content: bytes | None,
    expected: str,
    tmp_path: Path,
    refused: Refused,
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert expected in refused("fit", "--data.files", path)


DATASETS = {
    "no validation split": ({"train": ROWS}, "has no split 'validation'; it has train"),
    "an empty validation split": ({"train": ROWS, "validation": ""}, "validation"),
    "an empty training split": ({"train": "", "validation": ROWS}, "cannot load the dataset"),
    "no texts": (dict.fromkeys(("train", "validation"), '{"text": 5}\n'), "a document is 5, not"),
    "another column": (
        dict.fromkeys(("train", "validation"), '{"words": "a b c"}\n'),
        "has no column 'text'; it has words",
    ),
}


@pytest.mark.parametrize("streaming", ["true", "false"])
@pytest.mark.parametrize("kind", DATASETS)
def test_a_dataset_that_lacks_something_is_refused(
    kind: str, streaming: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits, message = DATASETS[kind]
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, content in splits.items():
        (folder / f"{split}.jsonl").write_text(content)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    words = ["--data.files", "null", "--data.dataset", folder, "--data.streaming", streaming]
    line = refused("fit", *words)
    assert message in line


VALIDATION = {
    "empty": ("", "is empty"),
    "blank": ('{"text": " "}\n', "has no text"),
    "short": ('{"text": "a"}\n', "is shorter than one sequence of 32 tokens"),
}


@pytest.mark.parametrize("streaming", ["true", "false"])
@pytest.mark.parametrize("kind", VALIDATION)
def test_nothing_to_validate_on_is_refused(
    kind: str, streaming: str, tmp_path: Path, refused: Refused
) -> None:
    content, message = VALIDATION[kind]
    (tmp_path / "train.jsonl").write_text(ROWS)
    (tmp_path / "validation.jsonl").write_text(content)
    words = ["--data.files", tmp_path / "train.jsonl", "--data.streaming", streaming]
    assert message in refused(
        "fit", *words, "--data.validation_files", tmp_path / "validation.jsonl"
    )


@pytest.mark.parametrize("content", [b"", b"half of it"], ids=["empty", "broken"])
@pytest.mark.parametrize("kind", ["text", "rows", "tokenizer"])
def test_a_prepared_file_that_a_crash_has_damaged_is_named(
    kind: str, content: bytes, tmp_path: Path, refused: Refused
) -> None:
    job = parse("fit", ["--config", str(tmp_path / "tiny.yaml")], default=None).job()
    job.new_data(job.memory_options).setup()
    damaged = next((tmp_path / "cache").glob(f"{kind}-*"))
    damaged.write_bytes(content)
    assert f"the prepared file {damaged} is damaged" in refused("fit")

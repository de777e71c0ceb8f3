"""Streamed runs on the command line: killed and resumed, and refused in one line."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import cli
from tests.tiny import start, write_settings

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself


def streamed_settings(folder: Path, **data: Any) -> Path:
    """Write a configuration that streams three files, in a folder of its own."""
    folder.mkdir()
    path = write_settings(folder)
    settings = yaml.safe_load(path.read_text())
    lines = (folder / "text.txt").read_text().splitlines()
    files = []
    for index in range(3):
        files.append(str(folder / f"{index}.jsonl"))
        texts = ("\n".join(lines[at : at + 20]) for at in range(index * 20, len(lines), 60))
        Path(files[-1]).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings["data"] |= {"files": files, "streaming": True, **data}
    settings["trainer"]["max_steps"] = 40
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_streamed_run_resumes_exactly(tmp_path: Path, num_workers: int) -> None:
    ends = []
    for name in ("calm", "killed"):
        settings = streamed_settings(tmp_path / name, num_workers=num_workers)
        checkpoints = settings.parent / "runs/default/version_0/checkpoints/last.ckpt"
        if name == "killed":
            process = start("fit", "--config", settings)
            deadline = time.monotonic() + 400
            while not checkpoints.exists():
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert cli.main(["fit", "--config", str(settings)]) == 0
        assert len(list(checkpoints.parent.parent.parent.iterdir())) == 1
        ends.append(torch.load(checkpoints, weights_only=True)["state_dict"])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"files": None}, "set data.dataset or data.files"),
        ({"text_column": "words"}, "line 1 has no column 'words'; it has text;"),
        ({"files": ["missing.jsonl"]}, "there is no file missing.jsonl"),
        ({"sources": [{"dataset": "x", "weight": 1}]}, "data.sources and data.files are both set"),
        ({"files": None, "sources": [{"dataset": "x"}]}, "data.sources[0].weight must be a number"),
    ],
    ids=["nothing", "column", "file", "sources", "weight"],
)
def test_wrong_settings_of_a_stream_are_one_line(
    tmp_path: Path, change: dict[str, Any], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = streamed_settings(tmp_path / "run", **change)
    assert cli.main(["fit", "--config", str(settings)]) == 2
    out, err = capfd.readouterr()
    assert expected in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert not (tmp_path / "run" / "runs").exists()


def test_a_broken_line_in_the_middle_of_a_run_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foam_lightning.data.streaming._BLOCK_CHARACTERS", 2000)
    settings = streamed_settings(tmp_path / "run")
    for index in range(3):
        with (tmp_path / "run" / f"{index}.jsonl").open("a") as file:
            file.write("no JSON\n")
    words = ["--data.validation_files", str(tmp_path / "run" / "text.txt")]
    assert cli.main(["fit", "--config", str(settings), *words, "--trainer.max_steps", "400"]) == 2
    err = capfd.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ")
    assert "is not JSON" in err
    assert ".jsonl line " in err

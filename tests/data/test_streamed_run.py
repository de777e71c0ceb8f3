"""Streamed runs on the command line: killed and resumed."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import cli
from tests.support.tiny import start, write_settings

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

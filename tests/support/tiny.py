"""The command line on a model and a text so small that a whole run takes seconds."""

import argparse
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

SETTINGS = """
model:
  hidden_size: 32
  intermediate_size: 88
  num_hidden_layers: 2
  num_attention_heads: 2
  vocab_size: 320
  lr: 0.02
data:
  files: [{text}]
  sequence_length: 32
  batch_size: 4
  validation_sequences: 16
  cache_dir: {cache}
trainer:
  accelerator: cpu
  max_steps: 16
  val_check_interval: 8
  log_every_n_steps: 1
tune:
  trials: 5
  steps: 8
runs: {runs}
"""


def write_settings(folder: Path) -> Path:
    """Write a configuration whose run stays within `folder`."""
    text = folder / "text.txt"
    text.write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    path = folder / "tiny.yaml"
    path.write_text(
        SETTINGS.format(text=text, cache=folder / "cache", runs=folder / "runs"), encoding="utf-8"
    )
    return path


def start(*words: str | Path) -> "subprocess.Popen[str]":
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "cli.py"), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
    )

"""Steps on a real GPU: fused attention for grouped queries, and deterministic operators."""

import subprocess
import sys

import pytest
import torch

from foam_lightning.model import llama
from tests.support.tiny import REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS, HEADS, TOKENS = 2, 8, 1024
SCORES_BYTES = 4 * ROWS * HEADS * TOKENS**2  # what attention without a fused kernel would keep


@pytest.mark.parametrize("autocast", [False, True], ids=["32-true", "bf16-mixed"])
def test_grouped_queries_keep_no_scores(autocast):
    config = llama.create_config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=TOKENS,
    )
    with torch.device("cuda"):
        model = llama.create_initialized(config, seed=0)

    def take_step(tokens):
        ids = torch.zeros(ROWS, tokens, dtype=torch.int64, device="cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()

    take_step(8)  # allocates the workspaces of cuBLAS
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    take_step(TOKENS)
    assert torch.cuda.max_memory_allocated() - before < SCORES_BYTES


SCRIPT = """
from typing import get_args
from lightning.pytorch import Trainer
from foam_lightning.memory.device import train_small_model
from foam_lightning.settings import Precision
Trainer(accelerator="gpu", devices=1, logger=False, deterministic=True)
for precision in get_args(Precision):
    train_small_model("cuda:0", precision)
"""


def test_no_operator_of_a_step_is_refused_in_deterministic_mode():
    # In a process of its own: torch reads the settings of cuBLAS once.
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=45,
    )
    assert run.returncode == 0, run.stderr[-2000:]

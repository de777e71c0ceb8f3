"""The tests. Without a GPU, Triton's interpreter runs the optimizer's kernel."""

import os

import torch

# Here, because Triton reads it when it is imported, which Lightning does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

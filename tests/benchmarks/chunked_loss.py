"""Time and memory of forward and backward with the plain and the chunked loss, on a CPU.

python -m tests.benchmarks.chunked_loss [--against COMMIT]

Another version of `foam_lightning/model/loss.py`, such as that of a33f8eb, which made the logits of
each chunk twice, takes its turns between those of this one. Then the errors of the gradient of the
head: in bfloat16, relative to float64, by the number of chunks.
"""

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foam_lightning.memory.trace import Precision, weight_dtype
from foam_lightning.memory.tracker import StorageTracker
from foam_lightning.model import loss
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import MemoryOptions
from foam_lightning.units import format_bytes
from tests.benchmarks.heading import ROOT
from tuner.report.markdown import markdown_table

_LARGER = {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 32000}
# Settings of the model, rows and their length, precision.
CASES: dict[str, tuple[dict[str, int], int, int, Precision]] = {
    "default, 16 x 64, 32-true": ({}, 16, 64, "32-true"),
    "20M, 8 x 128, 32-true": (_LARGER, 8, 128, "32-true"),
    "20M, 8 x 128, bf16-true": (_LARGER, 8, 128, "bf16-true"),
}
_REPEATS = 7


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", metavar="COMMIT")
    against = parser.parse_args().against
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ways = {"plain": (loss, False), "chunked": (loss, True)}
    if against is not None:
        ways[f"chunked, {against}"] = (version_of(against), True)
    rows = [row for name, case in CASES.items() for row in measure(name, ways, *case)]
    heads = ["model, batch, precision", "loss", "median time", "fastest", "peak of the tensors"]
    print(markdown_table(heads, rows))
    chunks = (1, 4, 16, 64)
    errors = [f"{gradient_error(False):.2%}", *(f"{gradient_error(True, n):.2%}" for n in chunks)]
    print(markdown_table(["plain", *(f"{n} chunks" for n in chunks)], [errors]))


def version_of(commit: str) -> ModuleType:
    words = ["git", "show", f"{commit}:foam_lightning/model/loss.py"]
    text = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    module = ModuleType("loss_of_another_commit")
    exec(compile(text, words[-1], "exec"), module.__dict__)
    return module


def measure(
    name: str,
    ways: dict[str, tuple[ModuleType, bool]],
    settings: dict[str, int],
    rows: int,
    length: int,
    precision: Precision,
) -> list[list[str]]:
    module = LlamaFoam(**settings)
    module.set_plan(module.uniform_plan(0, MemoryOptions(micro_batch_size=rows)))
    before = torch.get_default_dtype()
    torch.set_default_dtype(weight_dtype(precision))
    module.configure_model()
    torch.set_default_dtype(before)
    ids = torch.randint(0, module.settings.vocab_size, (rows, length))
    steps = {way: step_of(module, ids, *version) for way, version in ways.items()}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(1 + _REPEATS):
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            times[way].append(time.perf_counter() - start)
    found = []
    for way, step in steps.items():
        with StorageTracker() as tracker:
            tracker.claim(module.parameters(), "weights")
            step()
        seconds = times[way][1:]
        peak = format_bytes(tracker.peak().total_bytes)
        milliseconds = (1000 * statistics.median(seconds), 1000 * min(seconds))
        found.append([name, way, *(f"{each:.0f} ms" for each in milliseconds), peak])
    return found


def step_of(
    module: LlamaFoam, ids: Tensor, version: ModuleType, chunked: bool
) -> Callable[[], None]:
    def step() -> None:
        module.zero_grad(set_to_none=True)

        def token_loss(hidden: Tensor, head: nn.Linear, labels: Tensor, **_: bool) -> object:
            return version.token_loss(hidden, head, labels, chunked=chunked)

        with patch("foam_lightning.module.token_loss", token_loss):
            module.mean_loss(module.hidden_states(ids), ids).backward()
        module.zero_grad(set_to_none=True)

    return step


def gradient_error(chunked: bool, num_chunks: int = 1) -> float:
    """Return the error of the head's gradient in bfloat16, as a share of its norm."""
    width, vocabulary, tokens = 128, 2000, 16384
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, width, generator=generator).bfloat16()
    head = nn.Linear(width, vocabulary, bias=False, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    head.weight.data.copy_(weight)
    labels = (torch.rand(1, tokens, generator=generator) ** 3 * vocabulary).long()
    with patch.multiple(loss, _MIN_CHUNK_TOKENS=1, _MAX_CHUNKS=num_chunks):
        total, count = loss.token_loss(hidden, head, labels, chunked=chunked)
    (found,) = torch.autograd.grad(total / count, head.weight)
    exact = head.weight.detach().double().requires_grad_()
    logits = hidden[0, :-1].double() @ exact.T
    (expected,) = torch.autograd.grad(cross_entropy(logits, labels[0, 1:]), exact)
    return float((found.double() - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()

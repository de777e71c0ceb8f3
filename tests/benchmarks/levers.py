"""What every lever costs in speed and spares in memory, each alone beside none, all in one run.

    python -m tests.benchmarks.levers [--output FILE]
    python -m tests.benchmarks.levers --device cuda [--output FILE]

Every row trains a copy of the same model on the same rows of tokens, one optimizer step of each in
turn, so that whatever else the machine does falls on all of them. On a CPU: the 20M model in
float32. On a GPU: the 350M model in bfloat16.
"""

import argparse
import shlex
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from foam_lightning.memory.trace import Precision, track_step, weight_dtype
from foam_lightning.module import LlamaFoam
from foam_lightning.optim.release import release_gradients
from foam_lightning.plan import Levers
from foam_lightning.units import in_words
from tests.benchmarks.heading import ROOT, dated, machine, packages, publish
from tests.benchmarks.stepping import say, seconds_of

LEVEL = 2
SEED = 0
THREADS = 2
NONE = "none"


@dataclass(frozen=True)
class Work:
    """What trains.

    Attributes:
        label: The name of the model.
        model: Arguments of `LlamaFoam`.
        precision: Lightning's name of it.
        levers: Where every row starts from.
        sequence_length: Tokens in a row.
        rounds: Timed steps of each row.
    """

    label: str
    model: Mapping[str, Any]
    precision: Precision
    levers: Levers
    sequence_length: int
    rounds: int


def choose_work(device: str, *, small: bool) -> Work:
    if small:
        sizes = {"hidden_size": 32, "intermediate_size": 88, "vocab_size": 300}
        return Work("tiny", sizes, "32-true", Levers(micro_batch_size=4), 32, rounds=3)
    if device == "cpu":
        settings = _settings("llama_20m")
        return Work("llama_20m", settings, "32-true", Levers(micro_batch_size=8), 128, rounds=30)
    levers = Levers(micro_batch_size=64, state_dtype="bfloat16")
    return Work("llama_350m", _settings("llama_350m"), "bf16-true", levers, 256, rounds=30)


def rows_of(start: Levers, device: str) -> dict[str, Levers]:
    """Pull one lever at a time."""
    whole = replace(start, activation_checkpointing=True)
    rows = {
        NONE: start,
        "chunked loss": replace(start, chunked_loss=True),
        "micro-batch of a half": _split(start, 2),
        "micro-batch of a quarter": _split(start, 4),
        "int8 state": replace(start, state_dtype="int8"),
        "selective checkpointing": replace(whole, selective_checkpointing=True),
        "whole checkpointing": whole,
        "gradient release": replace(start, gradient_release=True),
    }
    if device == "cuda":  # a CPU has no memory beside its own
        rows["state in host memory"] = replace(start, state_offload=True)
    return rows


class Trained:
    """A model that trains with some levers, step by step, as the training loop does.

    Args:
        work: What trains.
        levers: How.
        device: Where.
    """

    def __init__(self, work: Work, levers: Levers, device: str) -> None:
        self.levers = levers
        self.module = LlamaFoam(**work.model)
        plan = self.module.uniform_plan(LEVEL, levers)
        self.module.follow(plan)
        before = torch.get_default_dtype()
        torch.set_default_dtype(weight_dtype(work.precision))
        try:
            with torch.device(device):
                self.module.configure_model()
        finally:
            torch.set_default_dtype(before)
        model = self.module.model
        assert model is not None
        self.optimizer = self.module.make_optimizer(model.named_parameters(), plan)
        size = (levers.batch_size, work.sequence_length)
        stream = torch.Generator().manual_seed(SEED)
        ids = torch.randint(model.config.vocab_size, size, generator=stream).to(device)
        self._micro_batches = cycle(ids.split(levers.micro_batch_size))

    def next_batch(self) -> tuple[Tensor, Tensor]:
        ids = next(self._micro_batches)
        return ids, ids

    def step(self) -> None:
        times = self.levers.accumulate_grad_batches
        releases = self.levers.gradient_release
        with release_gradients(self.optimizer) if releases else nullcontext():
            for _ in range(times):
                ids, labels = self.next_batch()
                loss = self.module.mean_loss(self.module.hidden_states(ids), labels) / times
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


@dataclass
class Row:
    """One lever.

    Attributes:
        name: Of the lever.
        trained: What trains with it.
        peak_bytes: Of a step, weights and state included.
        seconds: Of the timed steps.
    """

    name: str
    trained: Trained
    peak_bytes: int
    seconds: list[float] = field(default_factory=list)


def measure(work: Work, device: str) -> list[Row]:
    """Measure the memory of each row, then time one step of each in turn.

    Every other round goes through the rows backwards, so that none always follows the same one.
    """
    peak_of: Callable[[Trained], int] = peak_on_cuda if device == "cuda" else peak_on_cpu
    rows = []
    for name, levers in rows_of(work.levers, device).items():
        trained = Trained(work, levers, device)
        rows.append(Row(name, trained, peak_of(trained)))
        trained.step()
        say(f"{name}: {in_words(rows[-1].peak_bytes)}")
    for number in range(work.rounds):
        for row in reversed(rows) if number % 2 else rows:
            row.seconds.append(seconds_of(row.trained.step, device))
        say(f"round {number + 1} of {work.rounds}")
    return rows


def peak_on_cpu(trained: Trained) -> int:
    """Take the first step, and add up the tensors that are alive in it at most."""
    return track_step(
        trained.module,
        trained.optimizer,
        trained.next_batch,
        accumulate_grad_batches=trained.levers.accumulate_grad_batches,
        gradient_release=trained.levers.gradient_release,
    ).peak.total_bytes


def peak_on_cuda(trained: Trained) -> int:
    """Take two steps, and add what torch allocates in the second to what stands between steps."""
    trained.step()
    states = (tensor for state in trained.optimizer.state.values() for tensor in state.values())
    standing = [*trained.module.parameters(), *trained.module.buffers(), *states]
    device = standing[0].device
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trained.step()
    torch.cuda.synchronize()
    in_step = torch.cuda.max_memory_allocated() - before
    return in_step + sum(
        tensor.nbytes
        for tensor in standing
        if isinstance(tensor, Tensor) and tensor.device == device
    )


def table(rows: Sequence[Row]) -> list[str]:
    """Compare every row with the one without a lever, step by step of the same round."""
    (none,) = (row for row in rows if row.name == NONE)
    lines = [
        "| lever | ms a step | of none | middle half of the rounds | peak | of none |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = [own / other for own, other in zip(row.seconds, none.seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        lines.append(
            f"| {row.name} | {statistics.median(row.seconds) * 1000:.4g} | {middle:.3f} | "
            f"{low:.3f} to {high:.3f} | {in_words(row.peak_bytes)} | "
            f"{row.peak_bytes / none.peak_bytes:.3f} |"
        )
    return lines


def heading(words: Sequence[str], work: Work, device: str) -> list[str]:
    hardware = machine()
    if device == "cuda":
        hardware = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; {hardware}"
    levers = work.levers
    tokens = levers.batch_size * work.sequence_length
    return [
        "# What levers cost and spare",
        "",
        f"- command: `{shlex.join(['python', '-m', 'tests.benchmarks.levers', *words])}`",
        f"- {dated()}, seed {SEED}",
        f"- {hardware}",
        f"- {packages('torch', 'lightning', 'transformers')}",
        f"- {work.label}, {work.precision}, level {LEVEL}, {levers.state_dtype} state; "
        f"{levers.batch_size} rows of {work.sequence_length} tokens a step, {tokens} in all",
        "",
        f"Time: of {work.rounds} steps, one of each row in turn; a ratio is of two steps of the "
        "same round, and the median of these is given. Peak: "
        + (
            "weights, state, and what torch allocates in a step at most."
            if device == "cuda"
            else "the storages of all tensors alive at once at most; what an operator takes inside "
            "itself is not seen. Int8 state has no compiled update on a CPU."
        ),
        "",
    ]


def _split(levers: Levers, times: int) -> Levers:
    return replace(
        levers,
        micro_batch_size=levers.micro_batch_size // times,
        accumulate_grad_batches=times,
    )


def _settings(model: str) -> dict[str, Any]:
    text = (ROOT / "configs" / f"{model}.yaml").read_text(encoding="utf-8")
    settings: dict[str, Any] = yaml.safe_load(text)["model"]
    return settings


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model, for a test")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(words)
    device, small = arguments.device, arguments.small
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch finds none; leave it out for the CPU")
    warnings.simplefilter("ignore")
    if device == "cpu" and not small:
        torch.set_num_threads(THREADS)
    work = choose_work(device, small=small)
    lines = [*heading(words, work, device), *table(measure(work, device))]
    publish(lines, arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])

"""The optimizer step of FOAM and of the baselines: time, lower bound and memory, in one run.

    python -m tests.benchmarks.optimizer_step [--output FILE]
    python -m tests.benchmarks.optimizer_step --device cuda --model llama_7b [--output FILE]

All rows update the same weights with the same gradients, one step of each row in turn, so that
other load on the machine affects all of them. On a CPU: float32, 12 matrices of 2048 x 2048, or the
matrices of a model. On a GPU: bfloat16, the matrices of a model, llama_1b if none is named.
"""

import argparse
import math
import re
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from tests.benchmarks.contenders import FOLDED, FUSED, LR, ROWS, Row, Weights
from tests.benchmarks.heading import ROOT, commit_and_date, machine, packages, publish
from tests.benchmarks.stepping import Stepped, cold_caches, step_all

SEED = 0
THREADS = 2
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Bytes per parameter alive at once: weights, gradients and the states of all rows. A model that
# would exceed the limit is cut to its first layers.
BYTES_PER_PARAMETER = {"cpu": 80, "cuda": 40}
MAX_BYTES = {"cpu": 12 * 10**9, "cuda": 90 * 10**9}

# What the kernel of a GPU must reach: its time over the floor, and that of fused AdamW over its.
MAX_OF_FLOOR, MIN_SPEEDUP = 1.25, 1.6

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Work:
    """Weights, rounds and rows of a table; see `stepping.step_all`."""

    label: str
    shapes: Shapes
    num_heads: int
    rounds: int
    copy_bytes: int
    begin_seconds: float = math.inf
    rows: Sequence[Row] = ROWS


def choose_work(device: str, model: str | None, *, small: bool) -> Work:
    if small:
        shapes = square_matrices(1, 64) | {"model.embed_tokens.weight": (64, 64)}
        return Work("5 matrices of 64 x 64", shapes, 4, rounds=2, copy_bytes=2**20)
    fast_rows = [row for row in ROWS if not row.is_slow_on_cpu]
    if model is None and device == "cpu":
        shapes = square_matrices(3, 2048)
        return Work(
            "12 matrices of 2048 x 2048", shapes, 32, rounds=7, copy_bytes=2**28, rows=fast_rows
        )
    name = model or "llama_1b"
    whole, num_heads = llama_shapes(name)
    most_bytes = MAX_BYTES[device]
    if device == "cuda":
        most_bytes = min(most_bytes, torch.cuda.mem_get_info()[0])
    kept, layers = cut(whole, most_bytes // BYTES_PER_PARAMETER[device])
    label = f"the {len(kept)} matrices of {name}, {layers}"
    if device == "cpu":
        return Work(label, kept, num_heads, rounds=3, copy_bytes=2**28, rows=fast_rows)
    return Work(label, kept, num_heads, rounds=10, copy_bytes=2**30, begin_seconds=400)


def square_matrices(num_layers: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"model.layers.{layer}.self_attn.{role}_proj.weight": (width, width)
        for layer in range(num_layers)
        for role in "qkvo"
    }


def llama_shapes(model: str) -> tuple[Shapes, int]:
    """Read the shapes of the matrices, norms left out, and the number of heads from `configs/`."""
    from foam_lightning.module import LlamaFoam

    path = ROOT / "configs" / f"{model}.yaml"
    if not path.exists():
        raise SystemExit(f"--model {model}: configs/{model}.yaml does not exist; try llama_7b")
    module = LlamaFoam(**yaml.safe_load(path.read_text(encoding="utf-8"))["model"])
    shapes = {name: shape for name, shape in module.shapes.items() if len(shape) == 2}
    return shapes, module.llama_config().num_attention_heads


def cut(shapes: Shapes, num_elements: int) -> tuple[Shapes, str]:
    """Keep the first layers that fit, and all that is outside layers; also describe the cut."""
    found = {name: re.search(r"layers\.(\d+)\.", name) for name in shapes}
    layers = {name: int(match[1]) for name, match in found.items() if match}
    num_layers = 1 + max(layers.values())
    for kept in range(num_layers, 0, -1):
        fitting = {name: shape for name, shape in shapes.items() if layers.get(name, 0) < kept}
        if sum(map(math.prod, fitting.values())) <= num_elements:
            return fitting, f"{kept} of its {num_layers} layers"
    raise SystemExit(f"one layer has more than the limit of {num_elements} elements")


# ---- the tables


def full_table(names: Sequence[str], work: Work, device: str) -> list[str]:
    weights = Weights.draw(
        work.shapes, work.num_heads, device=device, dtype=DTYPES[device], seed=SEED
    )
    rows = chosen(names, ROWS) if names else work.rows
    *_, (found, bandwidth) = step_all(
        rows,
        weights,
        rounds=work.rounds,
        copy_bytes=work.copy_bytes,
        begin_seconds=work.begin_seconds,
    )
    assert bandwidth is not None
    watched = (
        "peak memory allocated in a step, minus the memory before it"
        if device == "cuda"
        else "peak bytes of tensors created in a step; memory inside compiled code and kernels is "
        "not measured"
    )
    left_out = [] if names else [row.name for row in ROWS if row not in rows]
    return [
        f"- {work.label}, {weights.num_elements / 1e6:.4g} million weights in "
        f"{str(weights.dtype).removeprefix('torch.')}; learning rate {LR:g}, no weight decay, "
        "otherwise default settings",
        "",
        f"Time: median of {work.rounds} steps, one of each row in turn, after three warm-up steps. "
        "Floor: the time to read and write weights and state and to read gradients, at the faster "
        f"of a copy, {bandwidth.copy / 1e9:.4g} GB/s, and a multiplication in place, "
        f"{bandwidth.in_place / 1e9:.4g} GB/s, measured between the steps. "
        f"Temporaries: {watched}. First step: from creating the optimizer to the end of its first "
        "step; only code that an earlier row also uses was compiled before.",
        "",
        "GaLore and APOLLO have rank 1/4 of the smaller side. GaLore computes one SVD, of its "
        "first matrix, in its first step; the other matrices begin with a random basis, with which "
        "a step costs the same. No timed step contains an SVD."
        + (f" Too slow for a CPU: {', '.join(left_out)}." if left_out else ""),
        "",
        *table(found, weights, max(bandwidth)),
        *(targets(found, weights, max(bandwidth)) if device == "cuda" else []),
    ]


def table(found: Sequence[Stepped], weights: Weights, bandwidth: float) -> list[str]:
    fused = [row.median_seconds for row in found if row.name == FUSED and row.failure is None]
    lines = [
        "| optimizer | ms | of fused AdamW | of the floor | temporaries, MB | state, MB | "
        "first step, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if row.failure is not None:
            lines.append(f"| {row.name} | {row.failure} | | | | | |")
            continue
        floor = floor_seconds(row, weights, bandwidth)
        seen = row.temporary_bytes
        lines.append(
            f"| {row.name} | {row.median_seconds * 1e3:.4g} | "
            f"{f'{row.median_seconds / fused[0]:.2f}' if fused else '-'} | "
            f"{row.median_seconds / floor:.2f} | "
            f"{'not measured' if seen is None else f'{seen / 1e6:.4g}'} | "
            f"{row.state_bytes / 1e6:.4g} | {row.first_seconds:.3g} |"
        )
    return lines


def floor_seconds(row: Stepped, weights: Weights, bandwidth: float) -> float:
    """Compute the time to read and write weights and state, and to read gradients."""
    weight_bytes = weights.num_elements * weights.dtype.itemsize
    return (3 * weight_bytes + 2 * row.state_bytes) / bandwidth


def targets(found: Sequence[Stepped], weights: Weights, bandwidth: float) -> list[str]:
    """Compare FOAM at its default level with what its kernel must reach."""
    rows = {row.name: row for row in found if row.failure is None}
    if not {FUSED, FOLDED} <= rows.keys():
        return []
    seconds = rows[FOLDED].median_seconds
    of_floor = seconds / floor_seconds(rows[FOLDED], weights, bandwidth)
    speedup = rows[FUSED].median_seconds / seconds
    return [
        "",
        f"{FOLDED}: {of_floor:.2f} of the floor (target: at most {MAX_OF_FLOOR}), "
        f"{'reached' if of_floor <= MAX_OF_FLOOR else 'missed'}; {speedup:.2f} times as fast as "
        f"fused AdamW (target: at least {MIN_SPEEDUP}), "
        f"{'reached' if speedup >= MIN_SPEEDUP else 'missed'}.",
    ]


def heading(words: Sequence[str], device: str) -> list[str]:
    hardware = machine()
    if device == "cuda":
        hardware = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; {hardware}"
    command = shlex.join(["python", "-m", "tests.benchmarks.optimizer_step", *words])
    return [
        "# The optimizer step",
        "",
        f"- command: `{command}`",
        f"- {commit_and_date()}, seed {SEED}",
        f"- {hardware}",
        f"- {packages('torch', 'torchao', 'pytorch-optimizer')}",
    ]


def chosen(names: Sequence[str], rows: Sequence[Row]) -> list[Row]:
    """Select the rows whose name contains one of these."""
    for name in names:
        if not any(name.lower() in row.name.lower() for row in rows):
            known = ", ".join(row.name for row in rows)
            raise SystemExit(f"--only {name} matches no row; the rows are: {known}")
    return [row for row in rows if any(name.lower() in row.name.lower() for name in names)]


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=tuple(DTYPES), default="cpu")
    parser.add_argument("--model", help="a file of configs/, such as llama_7b, for the shapes")
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a test")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="rows to run")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(words)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch finds none; leave it out for the CPU")
    warnings.simplefilter("ignore")
    if device == "cpu":
        torch.set_num_threads(THREADS)
    lines = heading(words, device)
    with cold_caches():
        work = choose_work(device, arguments.model, small=arguments.small)
        lines += full_table(arguments.only, work, device)
    publish(lines, arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])

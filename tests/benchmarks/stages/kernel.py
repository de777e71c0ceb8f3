"""The fused update against the plain one, over levels, dtypes and widths, in a thread."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import torch

from foam_lightning import FOAM
from tests.benchmarks.stages.record import Setting
from tests.benchmarks.stepping import seconds_of

LEVELS = (0, 1, 2, 3, 8, 20)  # 20 folds a whole row
COLUMNS = (4096, 11008, 5461)
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "int8": (torch.bfloat16, torch.int8),
}
STEPS = 4
# Of the weights that may differ, where rounding at random falls on the other side, and by how much
# of the largest update the others may.
MOST_DIFFERING, MOST_DIFFERENCE = 0.01, 1e-3


def compare_updates(setting: Setting) -> None:
    columns, rows = ((64, 31), 8) if setting.tiny else (COLUMNS, 512)
    if not setting.on_gpu:
        setting.record.note(
            "On a CPU only float32 has a fused update; the other rows compare the plain one with "
            "itself."
        )
    cases = {
        f"level {level}, {dtype}, {width} columns": (level, dtype, (rows, width))
        for width, dtype, level in product(columns, DTYPES, LEVELS)
    }
    results: list[str] = []
    with ThreadPoolExecutor(1) as thread:  # as autograd's on a GPU, not the main one
        for name in setting.missing(list(cases), 1.0):
            try:
                values = thread.submit(_compare, setting.device, *cases[name]).result()
            except Exception as error:  # this case's alone
                values = {"failure": f"{type(error).__name__}: {error}"[:300]}
            setting.record.row(name, **values)
            results.append(str(values.get("result", "failed")))
    counts = [f"{results.count(word)} {word}" for word in dict.fromkeys(results)]
    setting.record.note(f"Fused and plain after {STEPS} steps: {', '.join(counts)}.")


def _compare(device: str, level: int, dtype: str, shape: tuple[int, int]) -> dict[str, Any]:
    weight_dtype, state_dtype = DTYPES[dtype]
    stream = torch.Generator(device).manual_seed(0)

    def draw(std: float) -> torch.Tensor:
        values = torch.empty(shape, device=device).normal_(std=std, generator=stream)
        return values.to(weight_dtype)

    first, gradients = draw(0.02), [draw(1e-3) for _ in range(STEPS)]
    results = {}
    for fused in (False, True):
        weight = torch.nn.Parameter(first.clone())
        optimizer = FOAM([weight], level=level, state_dtype=state_dtype, fused=fused)
        for gradient in gradients:
            weight.grad = gradient.clone()
            before = _reset_peak(device)
            seconds = seconds_of(optimizer.step, device)
            temporary = _peak(device) - before
        results[fused] = (weight.detach().float(), seconds, temporary)
    plain, fused = (results[key][0] for key in (False, True))
    gaps = (plain - fused).abs()
    differing = int(gaps.count_nonzero()) / gaps.numel()
    largest = float(gaps.max() / (plain - first.float()).abs().max())
    is_close = largest <= MOST_DIFFERENCE or differing <= MOST_DIFFERING
    values: dict[str, Any] = {
        "result": "equal" if differing == 0 else "last bits" if is_close else "DIFFERENT",
        "differing_share": differing,
        "largest_gap_of_update": largest,
        "plain_step_seconds": results[False][1],
        "fused_step_seconds": results[True][1],
    }
    if device == "cuda":
        values["fused_temporaries_bytes"] = results[True][2]
    if not (is_close and math.isfinite(largest)):
        values["failure"] = "fused and plain differ"
    return values


def _reset_peak(device: str) -> int:
    """Return the bytes that are allocated, and measure the peak from here on."""
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0

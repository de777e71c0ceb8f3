"""The optimizer step and the memory truth, as rows of a campaign."""

import gc
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch

from foam_lightning.plan import MemoryOptions
from tests.benchmarks import optimizer_step
from tests.benchmarks.combinations import Combination
from tests.benchmarks.contenders import FOLDED, FUSED, ROWS, Row, Weights
from tests.benchmarks.memory_runs import quiet
from tests.benchmarks.memory_truth import run_on_cpu, run_on_gpu
from tests.benchmarks.stages.record import Setting
from tests.benchmarks.stepping import cold_caches, step_all

STEPPED = (
    *(FUSED, "torch AdamW, foreach", FOLDED, "FOAM level 0", "FOAM level 1"),
    *("FOAM row fold", "torchao AdamW8bit", "FOAM level 2, int8"),
)


_COMPILER_SECONDS = 45  # at least left, or nothing is compiled


def time_optimizer_steps(setting: Setting) -> None:
    """Time the steps on the matrices of llama_7b, which are to reach the targets, then of llama_1b.

    llama_7b is cut to the layers that fit. What torch must compile comes last, because that may
    take all of the time.
    """
    warnings.simplefilter("ignore")
    all_rows = {row.name: row for row in ROWS}
    chosen = [all_rows[name] for name in STEPPED]
    plain = [row for row in chosen if setting.device not in row.compiled_on]
    compiled = [row for row in chosen if row not in plain]
    setting.record.note(
        "Bound: the time that reading and writing weights and state, and reading gradients, takes "
        "at the speed of a copy or a multiplication in place, the faster one. llama_1b has no "
        "target: its matrices are so small that launches from Python may take longer than the "
        "bound."
    )
    with cold_caches():
        _time_rows(setting, "llama_7b", plain)
        _time_rows(setting, "llama_1b", plain)
        # Compiling for a CPU takes half a minute.
        if not setting.tiny and setting.seconds_left() >= _COMPILER_SECONDS:
            _time_rows(setting, "llama_7b", [all_rows[FUSED], *compiled])
        elif not setting.tiny:
            for row in compiled:
                setting.record.row(f"llama_7b, {row.name}", failure="no time left to compile it")


def _time_rows(setting: Setting, model: str, chosen: Sequence[Row]) -> None:
    """Time some rows on the matrices of a model; every round of steps replaces their lines."""
    record = setting.record
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()  # of the rows before
    work = optimizer_step.choose_work(setting.device, model, small=setting.tiny)
    weights = Weights.draw(
        work.shapes,
        work.num_heads,
        device=setting.device,
        dtype=optimizer_step.DTYPES[setting.device],
        seed=optimizer_step.SEED,
    )
    compiles = any(setting.device in row.compiled_on for row in chosen)
    for found, bandwidth in step_all(
        chosen,
        weights,
        rounds=work.rounds,
        copy_bytes=work.copy_bytes,
        begin_seconds=setting.seconds_left() / 2,
    ):
        if bandwidth is None:
            continue
        speed = max(bandwidth)
        fused = {row.name: row.median_seconds for row in found if row.failure is None}
        for row in found:
            if compiles and row.name == FUSED:
                continue  # it has its line, beside the rows that compile nothing
            name = f"{model}, {row.name}"
            if row.failure is not None:
                record.row(name, failure=row.failure)
                continue
            bound = optimizer_step.floor_seconds(row, weights, speed)
            record.row(
                name,
                step_seconds=row.median_seconds,
                bound_seconds=bound,
                of_the_bound=row.median_seconds / bound,
                of_fused_AdamW=row.median_seconds / fused[FUSED] if FUSED in fused else None,
                temporaries_bytes=row.temporary_bytes,
                state_bytes=row.state_bytes,
                first_step_seconds=row.first_seconds,
                measured_speed_bytes_per_second=speed,
                rounds=len(row.seconds),
            )
    if model == "llama_7b" and not compiles:
        words = f"{work.label}, {weights.num_elements / 1e6:.4g} million in {weights.dtype}. "
        if not setting.on_gpu:
            words += "No GPU: the targets of a step are for its kernel."
        elif bandwidth is not None:
            words += "\n".join(optimizer_step.targets(found, weights, max(bandwidth))).strip()
        record.note(words)


_PLAIN = MemoryOptions(micro_batch_size=8, state_dtype="bfloat16")
CHANGES = {
    "release": replace(_PLAIN, gradient_release=True),
    "checkpointing": replace(_PLAIN, activation_checkpointing=True),
    "bf16-mixed": replace(_PLAIN, state_dtype="float32"),
    "selective": replace(_PLAIN, activation_checkpointing=True, selective_checkpointing=True),
    "int8": replace(_PLAIN, state_dtype="int8"),
    "chunked loss": replace(_PLAIN, chunked_loss=True),
}


def measure_memory(setting: Setting) -> None:
    """Compare predicted and measured peaks at level 2, each with one memory option."""
    quiet()
    if not setting.on_gpu:
        torch.set_num_threads(1)
    grid = {
        f"{model}, {change}": Combination(
            model, "bf16-mixed" if change == "bf16-mixed" else "bf16-true", "FOAM 2", options
        )
        for model in (("default",) if setting.tiny else ("llama_1b", "llama_350m"))
        for change, options in CHANGES.items()
    }
    names = [name for name in grid if not setting.record.has(name)]
    wanted = [grid[name] for name in names]
    runs = run_on_gpu(wanted, setting.seconds_left() - 5) if setting.on_gpu else run_on_cpu(wanted)
    ratios = []
    for row, name in zip(runs, names, strict=True):
        if isinstance(row.measured, str) or isinstance(row.predicted, str):
            reason = row.predicted if isinstance(row.predicted, str) else row.measured
            setting.record.row(name, failure=reason)
            continue
        values = {
            "predicted_bytes": row.predicted.tensors,
            "measured_bytes": row.measured.tensors,
            "ratio": row.ratio,
        }
        if row.predicted.device and row.measured.device:
            values |= {
                "predicted_on_card_bytes": row.predicted.device,
                "on_card_bytes": row.measured.device,
                "ratio_on_card": row.ratio_on_card,
                "predicted_workspace_bytes": row.predicted.workspace,
                "workspace_bytes": row.measured.workspace,
                "retries": row.measured.retries,
            }
        ratios.append(values["ratio_on_card" if "ratio_on_card" in values else "ratio"])
        setting.record.row(name, **values)
    if ratios:
        setting.record.note(
            f"Predicted over measured, {len(ratios)} runs: {min(ratios):.4f} to {max(ratios):.4f}."
        )

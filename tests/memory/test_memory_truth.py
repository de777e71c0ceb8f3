import math
import multiprocessing
import operator
import os
import time
from collections import Counter
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from foam_lightning.plan import MemoryOptions
from tests.benchmarks import memory_runs, memory_truth
from tests.benchmarks.combinations import (
    CHECKPOINTING,
    FOREACH,
    LEVELS,
    Combination,
    choose,
    every,
    pairs,
)
from tests.benchmarks.fresh_process import in_fresh_process
from tests.benchmarks.memory_runs import Peak, measure_on_cpu, predict
from tests.benchmarks.memory_truth import Row, summary

MB = 10**6


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_pair_of_settings_occurs(device: str) -> None:
    models, micro_batches = memory_truth.MODELS[device][:2], memory_truth.MICRO_BATCHES[device]
    with_offload = device == "cuda"
    grid = choose(models, micro_batches, 30, with_offload=with_offload)
    assert len(set(grid)) == 30
    found = {pair for one in grid for pair in pairs(one)}
    all_combinations = every(models, micro_batches, with_offload=with_offload)
    assert found == {pair for one in all_combinations for pair in pairs(one)}
    assert set(Counter(one.optimizer for one in grid)) == {*LEVELS, *FOREACH}
    assert set(Counter(one.checkpointing for one in grid)) == set(CHECKPOINTING)


CASES = [
    Combination("default", "32-true", "FOAM 0", MemoryOptions(micro_batch_size=2)),
    Combination(
        "default",
        "bf16-true",
        "FOAM mixed",
        MemoryOptions(micro_batch_size=2, accumulate_grad_batches=2, state_dtype="int8"),
    ),
    Combination(
        "default",
        "bf16-mixed",
        "FOAM 2",
        MemoryOptions(micro_batch_size=4, gradient_release=True, activation_checkpointing=True),
    ),
    Combination("default", "32-true", "AdamW foreach", MemoryOptions(micro_batch_size=1)),
    Combination(
        "default",
        "bf16-true",
        "AdamW loop",
        MemoryOptions(
            micro_batch_size=2,
            chunked_loss=True,
            activation_checkpointing=True,
            selective_checkpointing=True,
        ),
    ),
]


@pytest.mark.parametrize("one", CASES, ids=lambda one: f"{one.precision} {one.optimizer}")
def test_the_measured_peak_is_the_predicted_one_or_just_below(one: Combination) -> None:
    predicted, measured = predict(one, "cpu"), measure_on_cpu(one)
    assert measured.tensors <= predicted.tensors <= 1.001 * measured.tensors


def test_the_summary_counts_predictions_that_are_too_low() -> None:
    foam, adamw = CASES[0], CASES[3]
    rows = [
        Row(foam, Peak(1000), Peak(1000)),
        Row(foam, Peak(994), Peak(1000)),
        Row(adamw, Peak(1020), Peak(1000)),
        Row(adamw, Peak(1020), "no memory"),
    ]
    lines = summary(rows)
    assert lines[2] == "| all, tensors | 3 | 0.9940 | 1.0000 | 1.0200 | 1 | 1 |"
    assert lines[3].startswith("| FOAM, by the account | 2 | 0.9940 | 0.9970 | 1.0000 | 0 | 1 |")
    assert lines[4].startswith("| AdamW, by a trace | 1 |")


def test_workspaces_of_libraries_are_no_tensors_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # After the run 64 MB stay allocated, and the card has 700 MB outside the allocator.
    figures = {
        "memory_allocated": 64 * MB,
        "max_memory_allocated": 5_000 * MB,
        "memory_reserved": 5_200 * MB,
        "max_memory_reserved": 5_400 * MB,
        "mem_get_info": (74_100 * MB, 80_000 * MB),
        "memory_stats": {"num_alloc_retries": 3},
    }
    trained = []
    monkeypatch.setattr(memory_runs, "train", lambda *_: trained.append(1))
    monkeypatch.setattr(torch, "cuda", Mock(**{f"{k}.return_value": v for k, v in figures.items()}))
    peak = memory_runs.measure_on_gpu(CASES[0], 80_000 * MB)
    assert peak == Peak(4_936 * MB, 6_100 * MB, 64 * MB, 3)
    assert trained == [1]


def test_every_cell_has_a_figure_or_a_reason() -> None:
    foam, adamw = CASES[0], CASES[3]
    rows = [
        Row(foam, Peak(1000, 2000, 64), Peak(1000, 1600, 67)),
        Row(adamw, Peak(1000, None, 64), Peak(1000, 2000, 67)),
        Row(adamw, Peak(1000, None, 64), "OutOfMemoryError"),
        Row(foam, "no time left", "no time left"),
    ]
    header, _, *lines = memory_truth.table(rows, "cuda")
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in (header, *lines)]
    assert {len(row) for row in cells} == {len(cells[0])}
    assert all(cell for row in cells for cell in row)
    assert [row[-1] for row in cells[1:]] == ["1.2500", "-", "-", "-"]
    assert "tensors only" in cells[2]
    assert any(line.startswith("| FOAM, on the card | 1 | 1.2500") for line in summary(rows))


def test_a_new_process_returns_its_result_or_the_reason_why_there_is_none() -> None:
    context = multiprocessing.get_context("forkserver")
    assert in_fresh_process(context, 60, operator.neg, 7) == (-7, None)
    found, failure = in_fresh_process(context, 60, int, "no\nnumber")
    assert found is None
    assert failure is not None
    assert failure.startswith("ValueError: invalid literal")
    assert in_fresh_process(context, 60, os._exit, 1) == (None, "the process died")
    assert in_fresh_process(context, 0.5, time.sleep, 600) == (None, "not done after 0 s")


def fail(*_: object) -> Peak:
    raise RuntimeError("out of memory")


@pytest.mark.slow
def test_the_grid_goes_on_after_a_run_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10**11, 10**11))
    monkeypatch.setattr(memory_truth, "measure_on_gpu", fail)
    runs = memory_truth.run_on_gpu([CASES[0], CASES[3], CASES[1]], 500)
    rows = [next(runs), next(runs)]
    late = SimpleNamespace(monotonic=lambda: math.inf)
    monkeypatch.setattr(memory_truth, "time", late)  # too late for the third
    rows += runs
    measured = [row.measured for row in rows]
    assert measured == ["RuntimeError: out of memory"] * 2 + [memory_truth.NO_TIME]
    predicted = [row.predicted for row in rows if isinstance(row.predicted, Peak)]
    assert [peak.device is None for peak in predicted[:2]] == [False, True]


@pytest.mark.slow
def test_a_prediction_that_fails_dies_or_hangs_loses_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10**11, 10**11))
    monkeypatch.setattr(memory_truth, "measure_on_gpu", succeed)
    monkeypatch.setattr(memory_truth, "predict", predict_some)
    rows = list(memory_truth.run_on_gpu([*CASES[:4]], 34))
    failed, died, hung = (row.predicted for row in rows[:3])
    assert failed == "RuntimeError: out of memory"
    assert died == "the process died"
    assert str(hung).startswith("not done after")
    assert [row.measured for row in rows[:3]] == [memory_truth.NOT_PREDICTED] * 3
    assert rows[3].ratio == 2


def predict_some(one: Combination, _: str) -> Peak:
    if one == CASES[0]:
        return fail()
    if one == CASES[1]:
        os._exit(1)
    if one == CASES[2]:
        time.sleep(600)
    return Peak(2000)


def succeed(*_: object) -> Peak:
    return Peak(1000)

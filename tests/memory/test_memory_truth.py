import multiprocessing
import operator
import os
import time
from collections import Counter

import pytest
import torch

from foam_lightning.plan import MemoryOptions
from tests.benchmarks import memory_truth
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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_pair_of_settings_occurs(device: str) -> None:
    models, micro_batches = memory_truth.MODELS[device][:2], memory_truth.MICRO_BATCHES[device]
    grid = choose(models, micro_batches, 30)
    assert len(set(grid)) == 30
    found = {pair for one in grid for pair in pairs(one)}
    assert found == {pair for one in every(models, micro_batches) for pair in pairs(one)}
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
    assert lines[2] == "| all | 3 | 0.9940 | 1.0000 | 1.0200 | 1 | 1 |"
    assert lines[3].startswith("| FOAM, by the account | 2 | 0.9940 | 0.9970 | 1.0000 | 0 | 1 |")
    assert lines[4].startswith("| AdamW, by a trace | 1 |")


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
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**11, 10**11))
    monkeypatch.setattr(memory_truth, "measure_on_gpu", fail)
    rows = list(memory_truth.run_on_gpu([CASES[0], CASES[3]], 500))
    assert [row.measured for row in rows] == ["RuntimeError: out of memory"] * 2
    assert [row.predicted.device is None for row in rows] == [False, True]

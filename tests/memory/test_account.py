import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from foam_lightning.memory.account import Accountant, optimizer_state_bytes
from foam_lightning.memory.device import DeviceCosts
from foam_lightning.memory.timeline import Moment
from foam_lightning.memory.trace import (
    Precision,
    autocast_for,
    track_step,
    weight_dtype,
)
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan, MemoryOptions, StateDtype

MODEL_20M = {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 32000}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def plan_for(module: LlamaFoam, levels: int | str, memory_options: MemoryOptions) -> FoldPlan:
    if isinstance(levels, int):
        return module.uniform_plan(levels, memory_options)
    mixed = {name: (0, 3, 1, 8)[i % 4] for i, name in enumerate(module.foldable)}
    return replace(module.uniform_plan(0, memory_options), levels=mixed)


def measure(settings: dict[str, Any], plan: FoldPlan, length: int, precision: Precision) -> Moment:
    """Take one real step on the CPU, and measure it."""
    module = LlamaFoam(**settings)
    module.set_plan(plan)
    with default_dtype(weight_dtype(precision)):
        module.configure_model()

    def make_batch() -> tuple[Tensor, Tensor]:
        ids = torch.randint(
            0, module.settings.vocab_size, (plan.memory_options.micro_batch_size, length)
        )
        return ids, ids.clone()

    assert module.model is not None
    return track_step(
        module,
        module.make_optimizer(module.model.named_parameters(), plan),
        make_batch,
        accumulate_grad_batches=plan.memory_options.accumulate_grad_batches,
        gradient_release=plan.memory_options.gradient_release,
        grad_offload=plan.memory_options.grad_offload,
        autocast=autocast_for(precision),
    ).peak


# Precision, checkpointing, chunked loss, micro-batches per step (0: one, and gradients are
# released), levels, state: every pair of the first four occurs.
CASES: list[tuple[Precision, str, bool, int, int | str, StateDtype]] = [
    ("32-true", "none", False, 1, 0, "float32"),
    ("32-true", "none", True, 2, 2, "float32"),
    ("32-true", "whole", False, 2, "mixed", "float32"),
    ("32-true", "whole", True, 1, 2, "bfloat16"),
    ("bf16-true", "none", False, 2, 2, "bfloat16"),
    ("bf16-true", "none", True, 1, "mixed", "float32"),
    ("bf16-true", "whole", False, 1, 0, "bfloat16"),
    ("bf16-true", "whole", True, 2, 2, "int8"),
    ("bf16-mixed", "none", True, 1, 2, "float32"),
    ("bf16-mixed", "whole", False, 2, "mixed", "float32"),
    ("32-true", "none", False, 0, "mixed", "float32"),
    ("32-true", "whole", True, 0, 2, "float32"),
    ("bf16-true", "none", True, 0, 0, "float32"),
    ("bf16-true", "whole", False, 0, "mixed", "bfloat16"),
    ("bf16-mixed", "none", False, 0, 2, "bfloat16"),
    ("bf16-mixed", "whole", True, 0, "mixed", "float32"),
    ("bf16-true", "selective", False, 1, 2, "bfloat16"),
    ("bf16-mixed", "selective", False, 2, "mixed", "float32"),
    ("32-true", "selective", True, 0, 2, "float32"),
]


def check_case(settings: dict[str, Any], batch: int, length: int, case: Any) -> None:
    precision, checkpointing, chunked, accumulate, levels, state_dtype = case
    memory_options = MemoryOptions(
        micro_batch_size=batch // max(accumulate, 1),
        accumulate_grad_batches=max(accumulate, 1),
        activation_checkpointing=checkpointing != "none",
        selective_checkpointing=checkpointing == "selective",
        chunked_loss=chunked,
        gradient_release=accumulate == 0,
        state_dtype=state_dtype,
    )
    module = LlamaFoam(**settings)
    plan = plan_for(module, levels, memory_options)
    accountant = Accountant(
        module, num_layers=4, sequence_length=length, precision=precision, on_gpu=False
    )
    predicted = accountant.account(plan)
    measured = measure(settings, plan, length, precision)
    assert 0.995 <= predicted.peak_bytes / measured.total_bytes <= 1.01
    for term in ("weights", "optimizer_state"):
        assert predicted.breakdown[term] == measured.terms[term]


def ids_of(case: Any) -> str:
    precision, checkpointing, chunked, accumulate, levels, state_dtype = case
    memory_options = [checkpointing] * (checkpointing != "none") + ["chunked"] * chunked
    batches = f"x{accumulate}" if accumulate else "release"
    return "-".join([precision, *memory_options, batches, f"level {levels}", state_dtype])


def quick(*chosen: int) -> list[Any]:
    """Mark all cases slow but the chosen ones."""
    return [
        case if index in chosen else pytest.param(case, marks=pytest.mark.slow)
        for index, case in enumerate(CASES)
    ]


@pytest.mark.parametrize("case", quick(0, 1, 2, 5, 7, 9, 10, 13, 15, 16, 17, 18), ids=ids_of)
def test_the_account_is_what_a_real_step_takes(case: Any) -> None:
    check_case({}, 8, 64, case)


@pytest.mark.parametrize("case", quick(6, 12, 18), ids=ids_of)
def test_the_account_is_what_a_real_step_of_20m_takes(case: Any) -> None:
    check_case(MODEL_20M, 4, 128, case)


@pytest.mark.parametrize("case", [CASES[0], CASES[18]], ids=ids_of)
def test_the_account_is_what_a_step_with_grouped_queries_takes(case: Any) -> None:
    check_case({"num_key_value_heads": 2}, 8, 64, case)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["none", "whole"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize(
    ("settings", "batch", "length"), [({}, 8, 64), (MODEL_20M, 4, 128)], ids=["default", "20M"]
)
def test_the_account_is_what_a_step_with_sums_in_host_memory_takes(
    settings: dict[str, Any], batch: int, length: int, precision: Precision, checkpointing: bool
) -> None:
    memory_options = MemoryOptions(
        micro_batch_size=batch // 4,
        accumulate_grad_batches=4,
        activation_checkpointing=checkpointing,
        chunked_loss=checkpointing,
        gradient_release=True,
        grad_offload=True,
    )
    module = LlamaFoam(**settings)
    plan = module.uniform_plan(2, memory_options)
    accountant = Accountant(
        module, num_layers=4, sequence_length=length, precision=precision, on_gpu=False
    )
    account, measured = accountant.account(plan), measure(settings, plan, length, precision)
    assert 1 <= account.peak_bytes / measured.total_bytes <= 1.01
    assert account.breakdown["gradients"] == measured.terms["gradients"]
    assert accountant.lower_bound(plan) <= account.peak_bytes
    assert account.host_bytes == 0  # the device's memory is the only one


def test_sums_and_state_in_host_memory_are_no_part_of_the_peak_of_a_gpu() -> None:
    module = LlamaFoam()
    kept = MemoryOptions(micro_batch_size=2, accumulate_grad_batches=4)
    summed = replace(kept, gradient_release=True, grad_offload=True)
    accountant = accountant_of(module, on_gpu=True)
    accounts = [
        accountant.account(module.uniform_plan(0, options))
        for options in (kept, summed, replace(summed, state_offload=True))
    ]
    assert accounts[0].host_bytes == 0
    weights = accounts[0].breakdown["weights"]
    assert accounts[1].peak_bytes < accounts[0].peak_bytes - 0.5 * weights
    # Each pinned tensor is rounded up to a power of two.
    assert weights <= accounts[1].host_bytes < 2 * weights
    assert accounts[2].host_bytes == 3 * accounts[1].host_bytes  # and both moments of Adam
    whole = [2 ** math.ceil(math.log2(4 * math.prod(shape))) for shape in module.shapes.values()]
    assert accounts[1].host_bytes == sum(whole)


def test_repeated_keys_and_values_count() -> None:
    def activations(num_heads: int) -> int:
        module = LlamaFoam(num_key_value_heads=num_heads)
        plan = module.uniform_plan(2, MemoryOptions(micro_batch_size=8))
        return accountant_of(module, on_gpu=True).tensor_terms(plan)["activations"]

    # Those of two heads, repeated, are kept as those of four; those of one stay a view of it.
    assert activations(2) == pytest.approx(activations(4), rel=0.01)
    assert activations(1) < 0.95 * activations(4)


def accountant_of(module: LlamaFoam, *, on_gpu: bool) -> Accountant:
    return Accountant(module, num_layers=4, sequence_length=64, precision="32-true", on_gpu=on_gpu)


def test_a_gpu_adds_its_context_and_a_margin() -> None:
    module = LlamaFoam()
    plan = module.uniform_plan(2, MemoryOptions(micro_batch_size=2))
    bare = accountant_of(module, on_gpu=False).account(plan)
    full = accountant_of(module, on_gpu=True).account(plan)
    margin, slack = full.breakdown["margin"], full.breakdown["slack"]
    assert margin > DeviceCosts().workspace
    assert bare.breakdown["slack"] == 0
    device = {"context": DeviceCosts().context, "margin": margin, "slack": slack}
    assert full.breakdown == {**bare.breakdown, **device}
    assert 0 <= slack - full.peak_bytes * 0.02 < 1.1
    assert list(full.breakdown) == [
        *("weights", "gradients", "optimizer_state", "activations", "loss"),
        *("workspace", "context", "margin", "slack"),
    ]
    assert full.peak_bytes == sum(full.breakdown.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("batch", [(1, 1), (8, 1), (8, 2), (64, 0)], ids=str)
@pytest.mark.parametrize("checkpointing", [(False, False), (True, True), (True, False)], ids=str)
def test_no_peak_is_below_the_bound(
    precision: Precision, batch: tuple[int, int], checkpointing: tuple[bool, bool]
) -> None:
    rows, accumulate = batch
    memory_options = MemoryOptions(
        micro_batch_size=rows,
        accumulate_grad_batches=max(1, accumulate),
        gradient_release=accumulate == 0,
        activation_checkpointing=checkpointing[0],
        selective_checkpointing=checkpointing[1],
    )
    module = LlamaFoam(num_hidden_layers=6)
    accountant = Accountant(
        module, num_layers=6, sequence_length=64, precision=precision, on_gpu=False
    )
    plan = module.uniform_plan(2, memory_options)
    bound, account = accountant.lower_bound(plan), accountant.account(plan)
    peak = account.peak_bytes
    plan_bytes = account.breakdown["weights"] + account.breakdown["optimizer_state"]
    assert plan_bytes < bound <= peak
    assert accountant.fits(plan, peak)
    assert not accountant.fits(plan, peak - 1)


ON_GPU = [
    MemoryOptions(micro_batch_size=8),
    MemoryOptions(micro_batch_size=2, accumulate_grad_batches=4, activation_checkpointing=True),
    MemoryOptions(micro_batch_size=8, chunked_loss=True, gradient_release=True),
    MemoryOptions(
        micro_batch_size=2, accumulate_grad_batches=4, gradient_release=True, grad_offload=True
    ),
]


SEGMENTS = [{}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}]


@pytest.fixture(params=SEGMENTS, ids=["fixed", "expandable"])
def _segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    set_allocator(monkeypatch, request.param)


def set_allocator(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_the_margin_is_that_of_the_segments_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    module, found = LlamaFoam(vocab_size=3000, hidden_size=96), []
    plan = module.uniform_plan(2, MemoryOptions(micro_batch_size=8, gradient_release=True))
    for variables in SEGMENTS:
        set_allocator(monkeypatch, variables)
        found.append(accountant_of(module, on_gpu=True).account(plan))
    fixed, expandable = found
    assert expandable.breakdown["margin"] < fixed.breakdown["margin"]
    assert (fixed.expandable_segments, expandable.expandable_segments) == (False, True)
    assert not accountant_of(module, on_gpu=False).account(plan).expandable_segments


@pytest.mark.usefixtures("_segments")
@pytest.mark.parametrize(
    "memory_options", ON_GPU, ids=["plain", "accumulating", "released", "summed"]
)
def test_the_replay_requests_the_bytes_of_the_account(memory_options: MemoryOptions) -> None:
    module = LlamaFoam()
    accountant = accountant_of(module, on_gpu=True)
    for level in (0, 2, 8):
        plan = module.uniform_plan(level, memory_options)
        usage = accountant.replay_allocator(plan)
        assert usage.requested == sum(accountant.tensor_terms(plan).values())
        assert usage.reserved >= usage.allocated >= usage.requested


@pytest.mark.usefixtures("_segments")
@pytest.mark.parametrize(
    "memory_options", ON_GPU, ids=["plain", "accumulating", "released", "summed"]
)
def test_the_margin_covers_what_is_reserved_and_grows_with_the_state(
    memory_options: MemoryOptions,
) -> None:
    module = LlamaFoam()
    accountant = accountant_of(module, on_gpu=True)
    margins = []
    for level in (0, 1, 2, 3, 4, 8):
        plan = module.uniform_plan(level, memory_options)
        usage = accountant.replay_allocator(plan)
        margins.append(accountant.account(plan).breakdown["margin"])
        assert margins[-1] - DeviceCosts().workspace >= usage.reserved - usage.requested
    assert margins == sorted(margins, reverse=True)
    mixed = accountant.account(plan_for(module, "mixed", memory_options)).breakdown["margin"]
    assert margins[-1] <= mixed <= margins[0]


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    "memory_options", ON_GPU, ids=["plain", "accumulating", "released", "summed"]
)
def test_a_change_of_state_changes_the_peak_as_requested(
    memory_options: MemoryOptions, on_gpu: bool
) -> None:
    module = LlamaFoam()
    accountant = accountant_of(module, on_gpu=on_gpu)
    plans = [module.uniform_plan(level, memory_options) for level in (0, 1, 2, 4, 8)]
    states = [optimizer_state_bytes(module.shapes, p.levels, "float32") for p in plans]
    accounts = [accountant.account(plan).breakdown for plan in plans]
    # By state, margin and slack alone: the workspace and the moment of the peak may differ.
    planned = 0.98 if on_gpu else 1
    changing = [round((a["optimizer_state"] + a["margin"]) / planned) for a in accounts]
    for start, plan in enumerate(plans):
        for end in range(len(plans)):
            change = accountant.state_change(plan, changing[end] - changing[start])
            assert change == pytest.approx(states[end] - states[start], abs=2)
        # Less than the highest level keeps, and more than Adam does.
        for beyond in (-(10**8), 10**8):
            end = -1 if beyond < 0 else 0
            change = accountant.state_change(plan, changing[end] - changing[start] + beyond)
            expected = states[end] + beyond * planned - states[start]
            assert change == pytest.approx(expected, abs=2)


# FOAM.md section 4: layers, hidden, intermediate, heads, then weights and state in bfloat16 by
# level, GB of 1e9 bytes.
TABLE = {
    "60M": (8, 512, 1376, 8, 0.348, 0.298, 0.273, 0.260, 0.254, 0.248, 0.247),
    "130M": (12, 768, 2048, 12, 0.805, 0.635, 0.550, 0.507, 0.486, 0.466, 0.465),
    "350M": (24, 1024, 2736, 16, 2.208, 1.603, 1.301, 1.149, 1.074, 1.003, 0.999),
    "1.3B": (24, 2048, 5461, 32, 8.034, 5.619, 4.411, 3.807, 3.505, 3.222, 3.205),
    "3B": (32, 2560, 6848, 32, 16.115, 11.071, 8.550, 7.289, 6.658, 6.067, 6.031),
    "7B": (32, 4096, 11008, 32, 40.430, 27.478, 21.002, 17.764, 16.145, 14.628, 14.532),
    "13B": (40, 5120, 13824, 40, 78.095, 52.720, 40.032, 33.688, 30.516, 27.542, 27.353),
}
ROW_FOLD = 20  # wider than any matrix: one block in a row


@pytest.mark.parametrize("name", TABLE)
def test_weights_and_state_are_those_of_the_paper(name: str) -> None:
    layers, h, i, heads, *sizes = TABLE[name]
    module = LlamaFoam(
        hidden_size=h,
        intermediate_size=i,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32000,
    )
    weights = 2 * sum(math.prod(shape) for shape in module.shapes.values())
    rest = (2 * layers + 1) * h + 2 * 32000 * h
    assert weights == 2 * (layers * (4 * h * h + 3 * h * i) + rest)
    for level, gigabytes in zip((0, 1, 2, 3, 4, 8, ROW_FOLD), sizes, strict=True):
        levels = dict.fromkeys(module.foldable, level)
        found = weights + optimizer_state_bytes(module.shapes, levels, "bfloat16")
        narrow, wide = math.ceil(h / 2**level), math.ceil(i / 2**level)
        folded = layers * (4 * h * narrow + 2 * i * narrow + h * wide)
        assert found == weights + 4 * (folded + rest)
        assert round(found / 1e9, 3) == gigabytes

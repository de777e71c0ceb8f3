"""The account of int8 weights, against one real step on the CPU."""

import math
from typing import Any

import pytest

from foam_lightning.memory.account import Accountant
from foam_lightning.memory.trace import Precision
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import MemoryOptions, WeightsDtype
from tests.memory.test_account import MODEL_20M, measure, plan_for

DEFAULT: dict[str, Any] = {}
# Few tokens and a small vocabulary, so that the peak is in the backward pass of a layer.
WIDE = {"hidden_size": 256, "intermediate_size": 700, "vocab_size": 64}
CHECKPOINTING = {"none": (False, False), "selective": (True, True), "whole": (True, False)}


def options(checkpointing: str, **more: Any) -> MemoryOptions:
    checkpoints, selective = CHECKPOINTING[checkpointing]
    return MemoryOptions(
        micro_batch_size=2,
        activation_checkpointing=checkpoints,
        selective_checkpointing=selective,
        gradient_release=True,
        **{"state_dtype": "bfloat16", "weights_dtype": "int8", **more},
    )


def accountant(settings: dict[str, Any], length: int, precision: Precision) -> Accountant:
    return Accountant(
        LlamaFoam(**settings),
        num_layers=4,
        sequence_length=length,
        precision=precision,
        on_gpu=False,
    )


@pytest.mark.parametrize(
    ("settings", "length", "precision", "checkpointing", "more"),
    [
        (DEFAULT, 32, "32-true", "none", {"state_dtype": "float32"}),
        (DEFAULT, 32, "bf16-true", "whole", {"chunked_loss": True}),
        (MODEL_20M, 16, "bf16-true", "none", {}),
        (MODEL_20M, 16, "bf16-true", "selective", {"chunked_loss": True}),
        (WIDE, 4, "bf16-true", "none", {"state_dtype": "int8"}),
        (WIDE, 4, "32-true", "selective", {}),
        (WIDE, 4, "bf16-mixed", "whole", {}),
    ],
)
def test_the_predicted_peak_is_that_of_a_real_step(
    settings: dict[str, Any],
    length: int,
    precision: Precision,
    checkpointing: str,
    more: dict[str, Any],
) -> None:
    plan = plan_for(LlamaFoam(**settings), "mixed", options(checkpointing, **more))
    predicted = accountant(settings, length, precision).account(plan).peak_bytes
    measured = measure(settings, plan, length, precision).total_bytes
    assert measured <= predicted <= 1.01 * measured


def test_codes_and_scales_are_counted() -> None:
    def terms(dtype: WeightsDtype | None) -> dict[str, int]:
        plan = plan_for(LlamaFoam(**WIDE), 2, options("whole", weights_dtype=dtype))
        return accountant(WIDE, 4, "bf16-true").tensor_terms(plan)

    shapes = LlamaFoam(**WIDE).foldable
    elements = sum(math.prod(shape) for shape in shapes.values())
    scales = sum(shape[0] * math.ceil(shape[1] / 128) for shape in shapes.values())
    plain, int8 = terms(None), terms("int8")
    assert plain["weights"] - int8["weights"] == elements - 2 * scales
    assert int8["optimizer_state"] == plain["optimizer_state"]

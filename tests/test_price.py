from dataclasses import replace

import pytest

from foam_lightning.memory.options import option_costs, selective_rows
from foam_lightning.plan import MemoryOptions

PLAIN = MemoryOptions(micro_batch_size=4)
SHAPES = {
    "model.embed_tokens.weight": (500, 10),
    "model.layers.0.self_attn.q_proj.weight": (100, 150),
    "model.layers.0.input_layernorm.weight": (10_000,),
    "model.layers.1.mlp.down_proj.weight": (100, 300),
    "lm_head.weight": (500, 10),
}
TIED = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}


def test_what_is_not_pulled_costs_nothing() -> None:
    assert option_costs(PLAIN, SHAPES, 1) == {}


@pytest.mark.parametrize("shapes", [SHAPES, TIED], ids=["untied", "tied"])
def test_work_is_a_share_of_the_products_of_three_passes(
    shapes: dict[str, tuple[int, ...]],
) -> None:
    # 45000 weights multiply in the decoder, 5000 in the head; forward once, backward twice.
    memory_options = replace(PLAIN, chunked_loss=True, activation_checkpointing=True)
    found = option_costs(memory_options, shapes, 1)
    assert found["chunked_loss"].startswith("3.3% more compute")
    assert found["activation_checkpointing"].startswith("30% more compute")


def test_selective_checkpointing_makes_no_product_again() -> None:
    memory_options = replace(PLAIN, activation_checkpointing=True, selective_checkpointing=True)
    assert list(option_costs(memory_options, SHAPES, 1)) == ["selective_checkpointing"]


def test_selective_checkpointing_pays_from_some_work_on() -> None:
    # A row of 10 tokens makes 2 * 10 * 22500 multiplications in each of the two layers.
    assert selective_rows(SHAPES, 10, on_gpu=False) == 1112  # 5 ms * 1e11 / 450e3, rounded up
    assert selective_rows(SHAPES, 10, on_gpu=True) == 1_111_112
    assert selective_rows(SHAPES, 10**9, on_gpu=True) == 1


def test_state_in_host_memory_crosses_the_bus_there_and_back() -> None:
    found = option_costs(replace(PLAIN, state_offload=True), SHAPES, 7_500_000_000)
    assert found == {"state_offload": "15 GB cross the PCIe bus every step"}


def test_every_lever_has_a_price() -> None:
    accumulating = MemoryOptions(
        micro_batch_size=1,
        accumulate_grad_batches=2,
        chunked_loss=True,
        activation_checkpointing=True,
        state_dtype="int8",
        state_offload=True,
    )
    released = replace(accumulating, accumulate_grad_batches=1, gradient_release=True)
    assert set(option_costs(accumulating, SHAPES, 1)) | set(option_costs(released, SHAPES, 1)) == {
        "chunked_loss",
        "accumulate_grad_batches",
        "activation_checkpointing",
        "gradient_release",
        "state_dtype",
        "state_offload",
    }

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from foam_lightning.distributed.topology import Devices
from foam_lightning.memory.account import Accountant
from foam_lightning.memory.inventory import TensorGroup
from foam_lightning.memory.timeline import TERMS
from foam_lightning.memory.trace import fake_tensors, track_step
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan, MemoryOptions
from tests.memory.test_trace import PLAIN, SELECTIVE, WHOLE

LAYERS = 6
SETTINGS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "vocab_size": 300,
    "num_hidden_layers": LAYERS,
}
RELEASED = replace(PLAIN, gradient_release=True)
OPTIONS = {
    "plain": replace(PLAIN, micro_batch_size=8),
    "a small batch": replace(PLAIN, micro_batch_size=1),
    "accumulated": replace(PLAIN, accumulate_grad_batches=3, chunked_loss=True),
    "checkpointed": WHOLE,
    "selective": SELECTIVE,
    "released": replace(RELEASED, state_dtype="int8"),
    "released, int8 weights": replace(RELEASED, weights_dtype="int8"),
    "released, offloaded": replace(RELEASED, micro_batch_size=1, state_offload=True),
    "summed": replace(RELEASED, accumulate_grad_batches=3, grad_offload=True),
}


def accountant(*, on_gpu: bool = True, **settings: Any) -> Accountant:
    return Accountant(
        LlamaFoam(**SETTINGS),
        num_layers=LAYERS,
        sequence_length=32,
        precision="32-true",
        on_gpu=on_gpu,
        **settings,
    )


def mixed(memory_options: MemoryOptions) -> FoldPlan:
    plan = LlamaFoam(**SETTINGS).uniform_plan(0, memory_options)
    levels = {name: (0, 3, 1, 8)[i % 4] for i, name in enumerate(plan.levels)}
    return replace(plan, levels=levels)


def by_term(groups: list[TensorGroup]) -> dict[str, int]:
    return {term: sum(group.num_bytes for group in groups if group.term == term) for term in TERMS}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_tensors_at_the_peak_add_up_to_every_term(name: str) -> None:
    found, plan = accountant(), mixed(OPTIONS[name])
    groups = found.list_tensors(plan)
    assert by_term(groups) == found.tensor_terms(plan)
    assert all(group.count > 0 and group.size > 0 for group in groups)
    assert all(group.origin.made_by for group in groups)
    sizes = [group.num_bytes for group in groups]
    assert sizes == sorted(sizes, reverse=True)


def test_the_tensors_of_one_of_several_devices_add_up() -> None:
    plan = mixed(OPTIONS["plain"])
    shared = accountant(devices=Devices(count=2))
    groups = shared.list_tensors(plan)
    assert by_term(groups) == shared.tensor_terms(plan)
    buckets = [group for group in groups if group.origin.made_by == "bucket of gradients"]
    assert sum(group.num_bytes for group in buckets) == by_term(groups)["weights"]
    sharded = accountant(devices=Devices(count=2, shards=True))
    groups = sharded.list_tensors(plan)
    assert by_term(groups) == sharded.tensor_terms(plan)
    gathered = find(groups, "model.embed_tokens.weight", "throughout")
    assert [h.origin.shape for h in gathered if h.term == "weights"] == [(150, 64)]


def find(groups: list[TensorGroup], made_by: str, phase: str) -> list[TensorGroup]:
    return [h for h in groups if (h.origin.made_by, h.origin.phase) == (made_by, phase)]


def test_a_group_has_the_size_the_count_and_the_origin_of_its_tensors() -> None:
    found = accountant().list_tensors(mixed(OPTIONS["plain"]))
    (weights,) = find(found, "model.layers.*.mlp.gate_proj.weight", "throughout")
    assert (weights.count, weights.size, weights.term) == (LAYERS, 4 * 64 * 172, "weights")
    assert (weights.origin.shape, weights.origin.dtype) == ((172, 64), torch.float32)
    kept = find(found, "model.layers.*.self_attn.q_proj.weight exp_avg", "throughout")
    assert {group.origin.shape for group in kept} <= {(64, 64), (64, 8), (64, 32), (64, 1)}
    assert sum(group.count for group in kept) == LAYERS
    # In the middle of the loss every layer's activations are alive.
    (gate,) = find(found, "model.layers.*.mlp.gate_proj", "forward")
    assert (gate.count, gate.term) == (LAYERS, "activations")
    assert gate.size == 4 * 8 * 32 * 172
    assert any(h.term == "loss" and h.origin.shape[-1] == 300 for h in found)


def test_gradients_have_the_names_of_their_parameters() -> None:
    found = accountant().list_tensors(mixed(OPTIONS["accumulated"]))  # every gradient is alive
    gradients = {h.origin.made_by for h in found if h.term == "gradients"}
    assert "model.layers.*.mlp.up_proj.weight" in gradients
    assert gradients == {h.origin.made_by for h in found if h.term == "weights"}
    released = accountant().list_tensors(mixed(OPTIONS["released, offloaded"]))
    visiting = [h for h in released if h.term == "workspace" and " exp_avg" in h.origin.made_by]
    assert {h.origin.phase for h in visiting} == {"update"}
    assert len({h.origin.made_by.split()[0] for h in visiting}) == 1


def test_recomputed_tensors_have_the_phase_recompute() -> None:
    released = replace(WHOLE, micro_batch_size=8, gradient_release=True)
    found = accountant().list_tensors(mixed(released))
    phases = {h.origin.phase for h in found if h.term == "activations"}
    assert "forward" in phases
    assert phases & {"recompute", "backward"}


@pytest.mark.parametrize("name", ["plain", "accumulated", "checkpointed", "released"])
@pytest.mark.parametrize("depth", [3, LAYERS])
def test_recording_origins_changes_no_count(name: str, depth: int) -> None:
    memory_options = OPTIONS[name]

    def step(*, with_origins: bool) -> Any:
        def make_batch() -> tuple[Tensor, Tensor]:
            ids = torch.zeros(memory_options.micro_batch_size, 32, dtype=torch.int64)
            return ids, ids

        with fake_tensors("32-true"):
            module = LlamaFoam(**SETTINGS).build_for_trace(memory_options, depth)
            assert module.model is not None
            plan = mixed(memory_options)
            shallow = [n for n, _ in module.model.named_parameters()]
            levels = {n: level for n, level in plan.levels.items() if n in shallow}
            optimizer = module.make_optimizer(
                module.model.named_parameters(), replace(plan, levels=levels)
            )
            return track_step(
                module,
                optimizer,
                make_batch,
                accumulate_grad_batches=memory_options.accumulate_grad_batches,
                gradient_release=memory_options.gradient_release,
                num_layers=LAYERS,
                with_origins=with_origins,
            )

    plain, recorded = step(with_origins=False), step(with_origins=True)
    assert plain.peak == recorded.peak
    assert not plain.timeline.record.origins
    record = recorded.timeline.record
    assert len(record.origins) == len(record.sizes)
    # At any moment, not at the peak alone, the storages alive add up to the terms.
    for moment in (recorded.peak, *recorded.updates):
        held = recorded.timeline.count_alive(moment.time)
        found = dict.fromkeys(TERMS, 0)
        for index, count in held.items():
            found[TERMS[record.terms[index]]] += count * record.sizes[index]
        assert found == moment.terms

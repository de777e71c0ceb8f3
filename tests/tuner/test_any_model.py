"""`plan_for`: levels for any causal language model of transformers."""

import pytest
import torch
import transformers

from foam_lightning import plan_for
from foam_lightning.errors import ConfigError, InfeasibleBudgetError
from foam_lightning.memory.tracker import StorageTracker
from foam_lightning.model.activation_checkpointing import checkpoint_layers

SHARED = {
    **{"vocab_size": 500, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
    **{"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 5},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
GPT2 = {
    "vocab_size": 500,
    "n_embd": 64,
    "n_layer": 5,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MODELS = {
    "Llama": SHARED,
    "Qwen3": SHARED,
    "Gemma2": SHARED,
    "Phi3": SHARED,
    "GPT2": GPT2,
}  # fmt: skip
BATCH, LENGTH = 2, 32


def create(name, dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{name}{head}")(config).to(dtype).train()


def plan(model, budget, **options):
    sizes = {"batch_size": BATCH, "sequence_length": LENGTH, "device": "cpu"}
    return plan_for(model, budget, **{**sizes, **options})


def plan_at_least(model):
    """Return the smallest budget that works, in bytes."""
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan(model, "1kB")
    return caught.value.minimum_bytes


def measure(model, optimizer):
    """Train two steps in a plain loop, and return the peak of all tensors in bytes."""
    tracker = StorageTracker()
    ids = torch.randint(500, (BATCH, LENGTH))
    labels = ids.clone()
    for tensors in (model.parameters(), model.buffers(), [ids, labels]):
        tracker.claim(tensors, "weights")
    with tracker:
        for _ in range(2):
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return sum(tracker.peak().terms.values())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_any_family_trains_within_its_budget(name):
    model = create(name)
    adam = plan(model, "1GB")
    assert set(adam.levels.values()) == {0}
    least = plan_at_least(model)
    budget = (adam.peak_bytes + least) // 2
    folded = plan(model, budget)
    assert least < folded.peak_bytes <= budget
    assert max(folded.levels.values()) > 0
    measured = measure(model, folded.create_optimizer(model, 1e-3))
    assert measured <= folded.peak_bytes <= 1.04 * measured


def test_bfloat16_checkpointing_and_int8_state_are_counted():
    model = create("Llama", torch.bfloat16)
    plain, int8 = (plan(model, "1GB", state_dtype=dtype) for dtype in ("float32", "int8"))
    states = [one.account.breakdown["optimizer_state"] for one in (plain, int8)]
    assert states[1] < 0.3 * states[0]
    checkpoint_layers(model, selective=False)
    checkpointed = plan(model, "1GB", state_dtype="int8")
    optimizer = checkpointed.create_optimizer(model, 1e-3)
    measured = measure(model, optimizer)
    assert measured <= checkpointed.peak_bytes <= 1.04 * measured
    matrix = model.model.layers[0].mlp.down_proj.weight
    assert optimizer.state[matrix]["exp_avg"].dtype == torch.int8


def test_a_gpu_adds_its_context_and_margin():
    model = create("Llama")
    on_cpu, on_gpu = plan(model, "1GB"), plan(model, "1GB", device="cuda")
    extra = {name: on_gpu.account.breakdown.get(name, 0) for name in ("context", "margin")}
    assert min(extra.values()) > 0
    assert on_gpu.peak_bytes >= on_cpu.peak_bytes + sum(extra.values())


def test_embeddings_and_head_do_not_fold():
    levels = plan(create("GPT2"), "1GB").levels
    assert len(levels) == 5 * 4
    assert not any("wte" in name or "wpe" in name or "lm_head" in name for name in levels)


def test_what_cannot_be_planned_is_one_line():
    model = create("Llama")
    with pytest.raises(InfeasibleBudgetError, match="batch_size") as caught:
        plan(model, "1MB")
    assert "\n" not in str(caught.value)
    with pytest.raises(InfeasibleBudgetError):
        plan(model, caught.value.minimum_bytes - 1)
    assert plan(model, caught.value.minimum_bytes).peak_bytes == caught.value.minimum_bytes
    with pytest.raises(ConfigError, match="float16"):
        plan(create("Llama", torch.float16), "1GB")
    model.lm_head.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"1 are frozen.*lm_head"):
        plan(model, "1GB")

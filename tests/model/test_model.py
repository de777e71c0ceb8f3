from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from foam_lightning.data.module import TextData
from foam_lightning.errors import CheckpointError, ConfigError
from foam_lightning.memory.tracker import StorageTracker
from foam_lightning.model import llama, pretrained
from foam_lightning.model.activation_checkpointing import _selective_contexts, checkpoint_layers
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import MemoryOptions
from tests.support.pretrained import TINY, save_pretrained, save_tiny_llama


def tiny(**sizes):
    return llama.create_config(**{**TINY, **sizes})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 18}, "hidden_size 18 .*heads 4"),
        ({"hidden_size": 12}, "hidden_size 12 .*heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 .*heads 3"),
        ({"vocab_size": 0}, r"model\.vocab_size .*16777216, got 0"),
        ({"num_attention_heads": -1}, r"model\.num_attention_heads .*65536, got -1"),
    ],
)
def test_invalid_sizes_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**sizes)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_weights_depend_only_on_the_seed():
    first = weights(llama.create_initialized(tiny(), seed=3))
    before = torch.random.get_rng_state()
    assert torch.equal(first, weights(llama.create_initialized(tiny(), seed=3)))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, weights(llama.create_initialized(tiny(), seed=4)))
    assert 0.015 < float(first.std()) < 0.25  # ones in the norms, 0.02 elsewhere


def test_a_new_model_equals_that_of_transformers():
    ours = llama.create_initialized(tiny(), seed=0).eval()
    theirs = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 50, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


class Heads(TorchDispatchMode):
    """Collect the numbers of query, key and value heads of every fused attention."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "flash_attention" in func.name() and "backward" not in func.name():
            self.seen.add(tuple(part.shape[1] for part in args[:3]))
        return func(*args, **(kwargs or {}))


# No fused kernel of a GPU takes grouped queries in float32.
@pytest.mark.parametrize(
    ("dtype", "autocast", "key_heads"),
    [
        (torch.float32, False, 4),
        (torch.float32, True, 2),
        (torch.bfloat16, False, 2),
    ],
    ids=["32-true", "bf16-mixed", "bf16-true"],
)
def test_float32_repeats_keys_and_values_for_grouped_queries(dtype, autocast, key_heads):
    model = llama.create_initialized(tiny(), seed=0).to(dtype)
    ids = torch.arange(48).view(2, 24)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Heads() as heads:
        model(ids, labels=ids).loss.backward()
    assert heads.seen == {(4, key_heads, key_heads)}


def test_repeated_keys_and_values_change_no_loss_and_no_single_query():
    model = llama.create_initialized(tiny(), seed=0)
    ids = torch.arange(48).view(2, 24)
    loss, gradients = pass_through(model, None)
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    expected, others = pass_through(model, None)
    assert torch.equal(loss, expected)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, other)
    llama.use_causal_attention(model)
    with torch.no_grad(), Heads() as heads:
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    assert heads.seen == {(4, 4, 4), (4, 2, 2)}


class Frequencies(Callback):
    def __init__(self):
        self.seen = {}

    def look(self, module, moment):
        self.seen[moment] = module.model.model.rotary_emb.inv_freq.clone()

    def on_train_batch_end(self, trainer, module, *_):
        self.look(module, "training")

    def on_validation_batch_end(self, trainer, module, *_):
        self.look(module, "validation")


def test_rope_stays_float32_in_a_bfloat16_run(new_job):
    job = new_job(trainer={"precision": "bf16-true"})
    module = job.new_module()
    module.set_plan(job.uniform_plan(1))
    frequencies = Frequencies()
    trainer = job.new_trainer(job.memory_options, [frequencies], bare=True, max_steps=1)
    data = job.new_data(job.memory_options)
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data, verbose=False)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    expected = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    assert set(frequencies.seen) == {"training", "validation"}
    for found in frequencies.seen.values():
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_load_and_save_preserve_a_hugging_face_folder(tmp_path, corpus):
    folder = save_tiny_llama(tmp_path)
    model = pretrained.load_pretrained(str(folder))
    tokenizer = TextData(**corpus, vocab_size=300, sequence_length=16).tokenizer
    llama.save_model(model, tokenizer, tmp_path / "saved")
    original = AutoModelForCausalLM.from_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(weights(again), weights(original))
    ids = torch.randint(0, 50, (2, 20))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, original(ids).logits)
    for one in (again.config, again.generation_config):
        assert one.eos_token_id == tokenizer.eos_token_id
        assert one.use_cache
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path, corpus):
    (tmp_path / "file").write_text("in the way")
    tokenizer = TextData(**corpus, vocab_size=300, sequence_length=16).tokenizer
    with pytest.raises(CheckpointError, match=r"cannot write .*file/hf"):
        llama.save_model(
            llama.create_initialized(tiny(), seed=0), tokenizer, tmp_path / "file" / "hf"
        )


class Products(TorchDispatchMode):
    """Count matrix products and attentions, forward and recomputed."""

    def __init__(self):
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if any(part in name for part in ("mm", "attention")) and "backward" not in name:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def checkpointed(checkpointing, config):
    """Create a model with one of three kinds of checkpointing."""
    model = llama.create_initialized(config, seed=0)
    model.train()
    if checkpointing != "none":
        checkpoint_layers(model, selective=checkpointing == "selective")
    return model


def pass_through(model, dtype):
    """Return the loss and the gradients."""
    ids = torch.arange(48).view(2, 24)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
        loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["32-true", "bf16-mixed"])
@pytest.mark.parametrize("backend", BACKENDS, ids=["fused", "plain"])
@pytest.mark.parametrize("bias", [False, True], ids=["bare", "biased"])
def test_checkpointing_changes_no_gradient_and_repeats_no_product(bias, backend, autocast):
    config = tiny()
    config.attention_bias = config.mlp_bias = bias
    found, counts = {}, {}
    for checkpointing in ("none", "selective", "whole"):
        model = checkpointed(checkpointing, config)
        with sdpa_kernel(backend), Products() as products:
            found[checkpointing] = pass_through(model, autocast)
        counts[checkpointing] = products.counts
    loss, gradients = found.pop("none")
    assert len(gradients) == 2 * 9 + 3 + bias * 2 * 7
    for other, of_other in found.values():
        assert torch.equal(other, loss)
        assert all(map(torch.equal, of_other, gradients))
    assert counts["selective"] == counts["none"]
    # All but `down_proj`, of two layers.
    of_layers = 2 * (6 + (1 if backend is SDPBackend.FLASH_ATTENTION else 2))
    assert (counts["whole"] - counts["none"]).total() == of_layers


# Attention operators of a GPU, with their arguments after queries, keys and values.
ON_GPU = {
    "flash": (0.0, True),
    "efficient": (None, True, 0.0, True),
    "cudnn": (None, True, 0.0, True),
}


@pytest.mark.parametrize("kind", ON_GPU)
def test_attention_on_a_gpu_runs_once(kind):
    attention = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention")
    shape = (2, 4, 24, 8)
    parts = [torch.empty(shape, device="meta", requires_grad=True) for _ in range(3)]

    def layer(*parts):
        output = attention(*(part * 2 for part in parts), *ON_GPU[kind])[0]
        return output * 2

    with Products() as products:
        for once in (True, False):
            how = {"context_fn": lambda: _selective_contexts(7)} if once else {}
            checkpoint(layer, *parts, use_reentrant=False, **how).sum().backward()
            assert products.counts.total() == (1 if once else 1 + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_saved_by_a_selective_layer(dtype):
    hidden, inner, keys, heads = (TINY["hidden_size"], TINY["intermediate_size"], 8, 4)

    def kept(checkpointing, num_layers):
        torch.set_default_dtype(dtype)
        try:
            model = checkpointed(checkpointing, tiny(num_hidden_layers=num_layers))
        finally:
            torch.set_default_dtype(torch.float32)
        tracker = StorageTracker()
        tracker.claim(model.parameters(), "weights")
        with tracker:
            states = model.model(torch.zeros(2, 24, dtype=torch.int64), use_cache=False)
            tracker.mark("forward is over")
            del states
        return tracker.timeline().at("forward is over")[0].terms["activations"]

    def of_a_layer(checkpointing):
        return (kept(checkpointing, 3) - kept(checkpointing, 2)) / 48  # tokens

    elements = 4 * hidden + 2 * keys + 2 * inner
    assert of_a_layer("selective") == elements * dtype.itemsize + heads * 4
    assert of_a_layer("whole") == hidden * dtype.itemsize
    assert of_a_layer("none") > 1.5 * of_a_layer("selective")


def test_rows_beyond_a_sliding_window_are_refused(tmp_path):
    folder = save_pretrained(tmp_path, "mistral")  # its window is 64
    module = LlamaFoam(pretrained=str(folder))
    module.set_plan(module.uniform_plan(1, MemoryOptions(micro_batch_size=1)))
    module.configure_model()
    assert module.hidden_states(torch.zeros(1, 64, dtype=torch.int64)).shape == (1, 64, 32)
    with pytest.raises(ConfigError, match=r"65 tokens .* window of 64"):
        module.hidden_states(torch.zeros(1, 65, dtype=torch.int64))


def test_an_evaluation_is_not_checkpointed():
    model = checkpointed("selective", tiny()).eval()
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad(), Products() as products:
        model(ids)
    assert products.counts["aten::mm"] == 2 * 7 + 1

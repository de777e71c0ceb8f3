import pytest
import torch
from torch.nn import functional

from foam_lightning.memory.account import Accountant
from foam_lightning.memory.cuda_operators import attention_backward_bytes, embedding_backward_bytes
from foam_lightning.memory.tracker import StorageTracker
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import MemoryOptions


@pytest.mark.parametrize("tokens", [1, 1024, 3072])
def test_a_few_tokens_need_nothing(tokens: int) -> None:
    assert embedding_backward_bytes(tokens, 32000, 512) == 0


# Tokens, vocabulary, hidden size, and the partial sums; of the recipes 60M and 350M, of one token
# more than need none, and of a vocabulary that is smaller and one that is larger than the tokens.
SIZES = [
    (32768, 32000, 512, 35276),
    (8192, 32000, 1024, 9011),
    (3073, 32000, 512, 3380),
    (4096, 256, 64, 665),
    (4096, 128256, 4096, 4505),
]


@pytest.mark.parametrize(("tokens", "vocabulary", "hidden", "sums"), SIZES)
def test_partial_sums_are_in_float32(tokens: int, vocabulary: int, hidden: int, sums: int) -> None:
    found = embedding_backward_bytes(tokens, vocabulary, hidden)
    assert found - 4 * sums * hidden == 8 * (3 * tokens + 2 * min(tokens, vocabulary) + sums + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("as_on_cuda", [False, True])
def test_they_are_there_while_the_gradient_is_made(dtype: torch.dtype, as_on_cuda: bool) -> None:
    table = torch.ones(300, 8, dtype=dtype, requires_grad=True)
    ids = torch.zeros(4, 1000, dtype=torch.int64)
    with StorageTracker(as_on_cuda=as_on_cuda) as tracker:
        tracker.claim([table, ids], "weights")
        functional.embedding(ids, table).sum().backward()
    peak = tracker.peak().terms
    expected = embedding_backward_bytes(4000, 300, 8) if as_on_cuda else 0
    assert peak["workspace"] == expected
    assert peak["activations"] >= table.nbytes * as_on_cuda


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("rows", [48, 49])
def test_only_the_account_of_a_gpu_has_them(rows: int, release: bool) -> None:
    module = LlamaFoam(hidden_size=64, intermediate_size=32, vocab_size=3000, num_hidden_layers=1)
    options = MemoryOptions(micro_batch_size=rows, gradient_release=release)
    cpu, gpu = (
        Accountant(module, num_layers=1, sequence_length=64, precision="32-true", on_gpu=on_gpu)
        for on_gpu in (False, True)
    )
    plan = module.uniform_plan(2, options)
    passes = [accountant.replay_allocator(plan).requested for accountant in (cpu, gpu)]
    assert passes[1] >= passes[0]
    sizes = [set(accountant._traced_passes(options).events.sizes) for accountant in (cpu, gpu)]
    attention = {attention_backward_bytes(*[torch.empty(rows, 4, 64, 16)] * 2)}
    embedding = {embedding_backward_bytes(rows * 64, 3000, 64)} - {0}
    assert sizes[1] - sizes[0] == attention | embedding
    assert bool(embedding) == (rows == 49)


@pytest.mark.parametrize(
    ("dtype", "heads", "size", "tokens", "expected"),
    [
        # LLaMA 7B: 16 KiB a token, and what the softmax needs.
        (torch.bfloat16, (32, 32), 128, 256, 256 * 32 * (128 + 1) * 4),
        # Llama 3 8B: also the gradients of keys and values for every query head.
        (torch.bfloat16, (32, 8), 128, 256, 256 * 32 * ((128 + 1) * 4 + 2 * 128 * 2)),
        (torch.float32, (4, 4), 20, 130, 256 * 4 * (32 + 1) * 4),  # rounded up
    ],
)
def test_attention_keeps_sums_of_its_backward_pass_in_float32(
    dtype: torch.dtype, heads: tuple[int, int], size: int, tokens: int, expected: int
) -> None:
    query, key, value = (
        torch.empty(1, number, tokens, size, dtype=dtype, requires_grad=True)
        for number in (heads[0], heads[1], heads[1])
    )
    with StorageTracker(as_on_cuda=True) as tracker:
        tracker.claim([query, key, value], "weights")
        functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=heads[0] != heads[1]
        ).sum().backward()
    assert tracker.peak().terms["workspace"] == expected


def test_attention_is_not_at_the_peak_of_a_recipe() -> None:
    module = LlamaFoam(hidden_size=512, intermediate_size=1376, vocab_size=32000)
    for options in (
        MemoryOptions(micro_batch_size=16),
        MemoryOptions(
            micro_batch_size=16,
            gradient_release=True,
            chunked_loss=True,
            activation_checkpointing=True,
        ),
    ):
        terms = Accountant(
            module, num_layers=4, sequence_length=128, precision="bf16-true", on_gpu=True
        ).tensor_terms(module.uniform_plan(8, options))
        assert terms["workspace"] < attention_backward_bytes(*[torch.empty(16, 4, 128, 128)] * 2)

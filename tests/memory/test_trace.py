from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

from foam_lightning import FOAM
from foam_lightning.errors import ConfigError
from foam_lightning.memory.allocator import Events, ParameterUpdate, replay, two_steps
from foam_lightning.memory.timeline import Repeat
from foam_lightning.memory.trace import (
    Precision,
    autocast_for,
    fake_tensors,
    track_step,
    weight_dtype,
)
from foam_lightning.memory.tracker import StorageTracker
from foam_lightning.module import LlamaFoam
from foam_lightning.optim.plain_state import measure_state_bytes
from foam_lightning.plan import MemoryOptions
from tests.memory.test_allocator import totals

KB = 1000


def block(kilobytes: int = 1) -> Tensor:
    return torch.zeros(kilobytes * 250)


def test_the_peak_is_what_was_alive_at_once() -> None:
    with StorageTracker() as tracker:
        a = block(3)
        b = block(2)
        del a
        c = block(2)
        del b, c
        d = block(4)
    del d
    assert tracker.peak().total_bytes == 5 * KB


def test_views_and_changes_in_place_add_nothing() -> None:
    with StorageTracker() as tracker:
        a = block(3)
        views = [a[10:], a.view(10, -1).T, a.detach()]
        a.add_(1)
        del a
        b = block(1)  # the views keep the storage of a alive
    del views, b
    assert tracker.peak().total_bytes == 4 * KB


def test_every_output_of_an_operator_counts() -> None:
    with StorageTracker() as tracker:
        values, indices = block(1).sort()
    assert tracker.peak().total_bytes == (1 + 1 + 2) * KB
    del values, indices


def test_a_storage_counts_as_the_current_term_or_as_the_one_it_is_assigned_to() -> None:
    weights = block(5)
    tracker = StorageTracker()
    tracker.claim([weights, None], "weights")
    with tracker:
        activations = block(1)
        tracker.term = "loss"
        loss = block(2)
        gradients = block(3)
    tracker.claim([gradients], "gradients")
    assert tracker.peak().terms == {
        "weights": 5 * KB,
        "gradients": 3 * KB,
        "optimizer_state": 0,
        "activations": 1 * KB,
        "loss": 2 * KB,
        "workspace": 0,
    }
    del activations, loss


def test_state_counts_as_if_it_had_been_there_from_the_start() -> None:
    tracker = StorageTracker()
    with tracker:
        forward = block(6)
        del forward
        state = block(2)
    tracker.claim([state], "optimizer_state")
    assert tracker.peak().terms["activations"] == 6 * KB
    assert tracker.peak().total_bytes == 8 * KB


def test_a_repeated_stretch_counts_as_often_as_it_happens() -> None:
    tracker = StorageTracker()
    with tracker:
        kept = [block(1)]
        tracker.mark("start")
        kept.append(block(2))
        passing = block(3)
        del passing
        tracker.mark("stop")
        tracker.mark("start")  # a name keeps its first moment
        kept.append(block(1))
    assert tracker.peak().total_bytes == 6 * KB
    assert tracker.timeline([Repeat("start", "stop", 1)]).peak().total_bytes == 6 * KB
    # Four of the kept blocks, and the temporary one next to the last of them.
    assert tracker.timeline([Repeat("start", "stop", 4)]).peak().total_bytes == (1 + 4 * 2 + 3) * KB


def test_a_marked_moment_happens_as_often_as_the_stretch_around_it() -> None:
    tracker = StorageTracker()
    with tracker:
        tracker.mark("nothing")
        kept = [block(1)]
        tracker.mark("start")
        kept.append(block(2))
        tracker.mark("within")
        kept.append(block(3))
        tracker.mark("stop")
        kept.append(block(4))
        tracker.mark("after")

    def at(name: str, *repeats: Repeat) -> list[int]:
        return [moment.total_bytes // KB for moment in tracker.timeline(repeats).at(name)]

    thrice = Repeat("start", "stop", 3)
    assert (at("nothing"), at("start"), at("within"), at("after")) == ([0], [1], [3], [10])
    assert at("start", thrice) == [1]
    assert at("within", thrice) == [3, 8, 13]
    assert at("stop", thrice) == [6, 11, 16]
    assert at("after", thrice) == [20]


def test_storages_freed_in_another_repeated_stretch_are_balanced() -> None:
    tracker = StorageTracker()
    with tracker:
        tracker.mark("forward")
        saved = block(2)
        tracker.mark("loss")
        tracker.mark("backward")
        gradient = block(1)
        del saved
        tracker.mark("step")
        workspace = block(7)
    repeats = [Repeat("forward", "loss", 3), Repeat("backward", "step", 3)]
    assert tracker.timeline(repeats).peak().total_bytes == (3 * 1 + 7) * KB
    del gradient, workspace


@pytest.mark.parametrize("is_fake", [False, True], ids=["real", "fake"])
def test_fake_tensors_are_counted_like_real_ones(is_fake: bool) -> None:
    def run() -> int:
        layer = nn.Linear(64, 64)
        tracker = StorageTracker()
        tracker.claim(layer.parameters(), "weights")
        with tracker:
            layer(torch.ones(8, 64)).relu().sum().backward()  # type: ignore[no-untyped-call]
        return tracker.peak().total_bytes

    if is_fake:
        with fake_tensors("32-true"):
            assert run() == expected()
    else:
        assert run() == expected()


def expected() -> int:
    weights = 4 * (64 * 64 + 64)
    rows = 4 * 8 * 64
    # Weights and their gradients, input and gradient of the layer, the loss and its gradient.
    return 2 * weights + 2 * rows + 8


class Chain(nn.Module):
    """Three alike layers between an embedding and a head, as the trace wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 7)

    def layers(self) -> list[nn.Module]:
        return list(self.blocks)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.blocks:
            hidden = hidden + layer(hidden).relu()
        return hidden  # type: ignore[no-any-return]

    def mean_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.zeros(4, 5, dtype=torch.int64)
    return ids, ids


def test_a_step_trains_and_frees_the_gradients() -> None:
    module = Chain()
    before = [p.detach().clone() for p in module.parameters()]
    peak = track_step(module, FOAM(module.parameters()), batch, accumulate_grad_batches=2).peak
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert all(p.grad is None for p in module.parameters())
    weights = sum(p.nbytes for p in module.parameters())
    assert peak.terms["weights"] == weights
    assert peak.terms["gradients"] <= weights


def test_released_gradients_are_alive_one_by_one() -> None:
    step = track_step(Chain(), None, batch, gradient_release=True)
    gradients = [update.terms["gradients"] for update in step.updates]
    layers = [m for m in Chain().modules() if isinstance(m, nn.Linear | nn.Embedding)]
    owners = [
        (p.nbytes, sum(q.nbytes for q in m.parameters())) for m in layers for p in m.parameters()
    ]
    for (own, of_layer), alive in zip(owners, gradients, strict=True):
        assert own <= alive <= of_layer  # weight and bias of a layer come together
    assert step.peak.terms["gradients"] <= max(gradients)
    assert max(update.total_bytes for update in step.updates) <= step.peak.total_bytes


def test_an_update_inside_backward_is_workspace() -> None:
    module, kept = Chain(), Chain()
    optimizer = FOAM(module.parameters(), level=0)
    released = track_step(module, optimizer, batch, gradient_release=True)
    assert all(p.grad is None for p in module.parameters())
    assert measure_state_bytes(optimizer) == released.peak.terms["optimizer_state"]
    ordinary = track_step(kept, FOAM(kept.parameters(), level=0), batch)
    for term in ("weights", "optimizer_state"):
        assert released.peak.terms[term] == ordinary.peak.terms[term]
    assert released.peak.total_bytes < ordinary.peak.total_bytes
    # Moments and temporaries are born in the middle of backward, and are not activations.
    for update in released.updates:
        assert update.terms["workspace"] <= 4 * max(p.nbytes for p in module.parameters())
    first, last = (released.updates[i].terms for i in (-2, 0))
    assert first["activations"] > last["activations"]


def test_the_dtype_of_the_weights() -> None:
    assert weight_dtype("bf16-true") == torch.bfloat16
    assert weight_dtype("bf16-mixed") == weight_dtype("32-true") == torch.float32
    with pytest.raises(ConfigError, match="'64-true' is not supported"):
        weight_dtype("64-true")  # type: ignore[arg-type]
    with fake_tensors("bf16-true"):
        assert torch.empty(1).dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


PLAIN = MemoryOptions(micro_batch_size=4)
WHOLE = replace(PLAIN, activation_checkpointing=True)
SELECTIVE = replace(WHOLE, selective_checkpointing=True)
ALL = replace(WHOLE, micro_batch_size=16, chunked_loss=True)
OPTIONS = {
    "plain": PLAIN,
    "chunked": replace(PLAIN, micro_batch_size=16, chunked_loss=True),
    "accumulating": replace(PLAIN, accumulate_grad_batches=3),
    "checkpointing": WHOLE,
    "selective": SELECTIVE,
    "all": replace(ALL, accumulate_grad_batches=2),
    "releasing": replace(PLAIN, gradient_release=True),
    "releasing all": replace(ALL, gradient_release=True),
    "releasing selective": replace(SELECTIVE, gradient_release=True),
}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "32-true") for name in OPTIONS),
        *((name, "bf16-mixed") for name in ("plain", "all", "releasing all")),
    ],
)
def test_three_layers_stand_for_all(name: str, precision: Precision) -> None:
    memory_options = OPTIONS[name]
    module = LlamaFoam(hidden_size=64, intermediate_size=172, vocab_size=300)
    found, events = [], []
    for layers in (3, 6):
        with fake_tensors(precision):
            step = track_step(
                module.build_for_trace(memory_options, layers),
                None,
                lambda: (torch.zeros(memory_options.micro_batch_size, 32, dtype=torch.int64),) * 2,
                accumulate_grad_batches=memory_options.accumulate_grad_batches,
                gradient_release=memory_options.gradient_release,
                autocast=autocast_for(precision),
                num_layers=6,
            )
        moments = [dict(moment.terms) for moment in (step.peak, *step.updates)]
        for terms in moments:
            del terms["weights"]  # of the layers that were laid out
        found.append(moments)
        events.append(step.events)
    assert found[0] == found[1]
    assert len(found[0]) == 1 + (3 + 6 * 9) * memory_options.gradient_release
    folded, full = events
    assert totals(folded) == totals(full)
    assert sorted(folded.sizes) == sorted(full.sizes)
    assert updates_of(folded) == updates_of(full)
    updates = [ParameterUpdate((), 1)] * len(updates_of(full))
    usages = [replay(two_steps([], found, updates)) for found in events]
    assert usages[0].requested == usages[1].requested
    assert usages[0].reserved == pytest.approx(usages[1].reserved, rel=0.05)


def updates_of(events: Events) -> list[int]:
    return [at for at, name in events.marks if name.startswith("update ")]


PRIVATE_PARTS = {
    "_cdata of a storage": lambda: torch.empty(1).untyped_storage()._cdata,
    "UntypedStorage.resize_": lambda: torch.UntypedStorage(4).resize_(8),
    "FakeTensorMode": lambda: import_module("torch._subclasses.fake_tensor").FakeTensorMode,
    "_rebuild_buckets": lambda: torch.distributed.Reducer._rebuild_buckets,
    "FakeStore": lambda: import_module("torch.testing._internal.distributed.fake_pg").FakeStore,
    "_get_fsdp_state": lambda: FSDPModule._get_fsdp_state,
    "_pre_forward and _post_forward": lambda: (FSDPState._pre_forward, FSDPState._post_forward),
}


@pytest.mark.parametrize("name", PRIVATE_PARTS)
def test_torch_still_has_the_private_parts_that_the_trace_uses(name: str) -> None:
    try:
        PRIVATE_PARTS[name]()
    except (AttributeError, ImportError) as error:
        pytest.fail(
            f"torch {torch.__version__} has no {name} ({error}); it was there in 2.11 to 2.13"
        )


def test_a_storage_that_is_resized_in_place_is_seen() -> None:
    with StorageTracker() as tracker:
        gathered = block(1)
        gathered.untyped_storage().resize_(0)
        gathered.untyped_storage().resize_(3 * KB)
    assert tracker.peak().total_bytes == 3 * KB
    assert tracker.peak().terms["workspace"] == 3 * KB


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    yield
    assert torch.get_default_dtype() == torch.float32

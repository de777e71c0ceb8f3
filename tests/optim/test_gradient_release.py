import copy
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from foam_lightning import FOAM
from foam_lightning.errors import ConfigError
from foam_lightning.optim.gradient_release import release_gradients
from tests.support.runs import StopError
from tests.support.training import assert_same


def plain(block, hidden):
    return block(hidden)


def checkpointed(block, hidden):
    return checkpoint(block, hidden, use_reentrant=False)


class Net(nn.Module):
    """A net with the hard cases: a tied head, a layer used twice, a layer used in some steps."""

    def __init__(self, *, checkpointing=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.twice = nn.Linear(6, 6)
        self.odd = nn.Linear(6, 6, bias=False)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.Parameter(torch.ones(6))
        self.run_block = checkpointed if checkpointing else plain

    def block(self, hidden):
        return hidden + self.frozen(self.twice(hidden)).tanh() * self.norm

    def forward(self, ids, *, with_odd=True):
        hidden = self.embed(ids)
        for _ in range(2):
            hidden = self.run_block(self.block, hidden)
        if with_odd:
            hidden = hidden + self.odd(hidden)
        return nn.functional.cross_entropy(hidden @ self.embed.weight.T, ids)

    def run(self, optimizer, *, releases):
        """Train with a schedule, the odd layer in every second step only."""
        schedule = LambdaLR(optimizer, lambda step: 1 / (step + 1))
        losses = []
        with release_gradients(optimizer) if releases else nullcontext():
            for step in range(4):
                loss = self(torch.arange(11).roll(step), with_odd=step % 2 == 0)
                loss.backward()
                assert releases == all(p.grad is None for p in self.parameters())
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses


def groups(net, **options):
    """Put matrices and the rest into groups of their own, with rates of their own."""
    matrices = [p for p in net.parameters() if p.ndim == 2]
    rest = [p for p in net.parameters() if p.ndim < 2]
    return [{"params": matrices, **options}, {"params": rest, "lr": 0.03}]


@given(
    level=st.integers(0, 3),
    checkpointing=st.booleans(),
    clip_norm=st.sampled_from([None, 0.01, 100.0]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    fused=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
)
def test_release_changes_no_bit(level, checkpointing, clip_norm, weight_decay, fused, dtype):
    found = []
    for releases in (False, True):
        net = Net(checkpointing=checkpointing).to(dtype)
        params = groups(net, level=level, clip_norm=clip_norm)
        optimizer = FOAM(params, lr=0.05, weight_decay=weight_decay, fused=fused)
        losses = net.run(optimizer, releases=releases)
        found.append((losses, net.state_dict(), optimizer.state_dict()))
        assert {s["step"] for s in optimizer.state.values()} == {4, 2}
        assert len(optimizer.state) == 5  # embed, twice (2), odd, norm
    assert_same(*found)


def test_after_backward_a_second_one_is_refused_and_step_changes_nothing():
    net = Net()
    optimizer = FOAM(net.parameters())
    with release_gradients(optimizer):
        net(torch.arange(11)).backward()
        before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
        with pytest.raises(ConfigError, match=r"second gradient.*accumulate_grad_batches 1"):
            net(torch.arange(11)).backward()
        net.zero_grad()
        optimizer.step()
    assert_same(before, (net.state_dict(), optimizer.state_dict()))


def test_after_the_context_gradients_stay():
    net = Net()
    optimizer = FOAM(net.parameters())
    with pytest.raises(StopError), release_gradients(optimizer):
        raise StopError
    before = copy.deepcopy(net.state_dict())
    net(torch.arange(11)).backward()
    assert net.norm.grad is not None
    assert_same(before, net.state_dict())
    assert not optimizer.state


def test_a_plain_call_releases_until_it_is_closed():
    net = Net()
    optimizer = FOAM(net.parameters())
    before = copy.deepcopy(net.state_dict())
    release = release_gradients(optimizer)
    for _ in range(2):
        net(torch.arange(11)).backward()
        assert all(p.grad is None for p in net.parameters())
        optimizer.step()
    assert not torch.equal(before["norm"], net.norm)
    assert optimizer.state[net.norm]["step"] == 2
    release.close()
    net(torch.arange(11)).backward()
    assert net.norm.grad is not None
    assert optimizer.state[net.norm]["step"] == 2


def test_releasing_twice_updates_once():
    net = Net()
    optimizer = FOAM(net.parameters())
    release_gradients(optimizer)
    with release_gradients(optimizer):
        net(torch.arange(11)).backward()
        optimizer.step()
    assert {state["step"] for state in optimizer.state.values()} == {1}


def test_two_backwards_over_different_parameters_are_one_step():
    left, right = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = FOAM([*left.parameters(), *right.parameters()])
    with release_gradients(optimizer):
        for half in (left, right):
            half(torch.ones(3)).sum().backward()
        optimizer.step()
    assert {state["step"] for state in optimizer.state.values()} == {1}


def test_options_are_read_from_the_groups_at_each_update():
    """A state that is loaded replaces the groups, and a schedule changes them."""
    nets = [Net(), Net()]
    for net, releases in zip(nets, (False, True), strict=True):
        optimizer = FOAM(groups(net), lr=0.05)
        with release_gradients(optimizer) if releases else nullcontext():
            saved = optimizer.state_dict()
            for group in saved["param_groups"]:
                group["lr"] = 0.5
            optimizer.load_state_dict(saved)
            for lr in (0.5, 0.0):
                optimizer.param_groups[1]["lr"] = lr
                net(torch.arange(11)).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert_same(nets[0].state_dict(), nets[1].state_dict())


def test_copies_are_not_hooked():
    net = Net()
    optimizer = FOAM(net.parameters())
    with release_gradients(optimizer):
        copied, its_optimizer = copy.deepcopy((net, optimizer))
        copied(torch.arange(11)).backward()
        assert copied.norm.grad is not None
        assert_same(copied.state_dict(), net.state_dict())
        its_optimizer.step()
        net(torch.arange(11)).backward()
    assert_same(copied.state_dict(), net.state_dict())


@pytest.mark.parametrize("fused", [True, False])
def test_changing_a_weight_that_backward_still_needs_is_an_error(fused):
    weight, x = nn.Parameter(torch.randn(4, 4)), torch.randn(4, requires_grad=True)
    optimizer = FOAM([weight], fused=fused)
    # The gradient of the weight comes first, and that of x still needs the old weight.
    loss = (weight @ (weight.detach() @ x)).sum()
    with release_gradients(optimizer), pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()

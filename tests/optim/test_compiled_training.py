"""torch.compile around training steps: the program differs, the weights do not."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo
from torch import nn

from foam_lightning import FOAM
from foam_lightning.optim.gradient_release import release_gradients
from tests.support.training import all_equal


@pytest.fixture(autouse=True)
def _compile_anew():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def train_net(*, step_only=False, releases=False, compiled=True, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = FOAM(net.parameters(), lr=1e-2, **options)
    # torch's own operators, without generated code: the same bits.
    compile_ = torch.compile(backend="aot_eager") if compiled else lambda function: function

    def backward():
        optimizer.zero_grad()
        net(torch.arange(32.0).view(4, 8).sin()).square().mean().backward()

    def step():
        backward()
        optimizer.step()

    if step_only:
        compiled_step = compile_(optimizer.step)

        def run():
            backward()
            compiled_step()
    else:
        run = compile_(step)
    with release_gradients(optimizer) if releases else nullcontext():
        for _ in range(3):
            run()
    return copy.deepcopy([*net.parameters()])


@pytest.mark.parametrize("options", [{}, {"fused": False}], ids=str)
def test_a_compiled_step_is_the_step(options):
    expected = train_net(compiled=False, **options)
    assert all_equal(train_net(step_only=True, **options), expected)


@pytest.mark.parametrize(
    ("releases", "compiles_backward"), [(False, False), (True, False), (True, True)]
)
def test_a_compiled_training_step_trains_alike(releases, compiles_backward):
    expected = train_net(compiled=False)
    with torch._dynamo.config.patch(compiled_autograd=compiles_backward):
        assert all_equal(train_net(releases=releases), expected)

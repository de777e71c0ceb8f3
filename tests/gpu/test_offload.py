"""State in host memory with a real GPU; tests/optim/test_offload.py simulates elsewhere."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from foam_lightning import FOAM
from foam_lightning.optim.gradient_offload import HostGradients
from foam_lightning.optim.gradient_release import release_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

COUNT, SIZE = 6, 2048  # matrices of 17 MB in float32


def network(dtype):
    torch.manual_seed(0)
    layers = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(COUNT))
    return nn.Sequential(*layers).to("cuda", dtype)


def train(net, optimizer, steps, *, releases=False):
    for step in steps:
        random = torch.Generator().manual_seed(step)
        x = torch.randn(64, SIZE, generator=random).to("cuda", next(net.parameters()).dtype)
        if releases:
            with release_gradients(optimizer):
                net(x).float().square().mean().backward()
                optimizer.step()
        else:
            net(x).float().square().mean().backward()
            optimizer.step()
        optimizer.zero_grad()


def moments(optimizer):
    return [
        value for state in optimizer.state.values() for key, value in state.items() if key != "step"
    ]


@pytest.mark.parametrize("releases", [False, True], ids=["step", "release"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.int8),
    ],
    ids=["f32", "bf16", "int8"],
)
def test_pinned_state_gives_the_same_weights(dtype, state_dtype, fused, releases):
    nets, optimizers = [], []
    for state_offload in (False, True):
        net = network(dtype)
        optimizer = FOAM(
            net.parameters(),
            level=1,
            state_dtype=state_dtype,
            fused=fused,
            state_offload=state_offload,
        )
        train(net, optimizer, range(4), releases=releases)
        nets.append(net)
        optimizers.append(optimizer)
    for kept, offloaded in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(kept, offloaded)
    for kept, offloaded in zip(*(moments(o) for o in optimizers), strict=True):
        assert kept.is_cuda
        assert offloaded.device.type == "cpu"
        assert offloaded.is_pinned()
        assert torch.equal(kept.cpu(), offloaded)


def test_the_peak_is_lower_by_the_state_of_all_parameters_but_one():
    peaks = []
    for state_offload in (False, True):
        net = network(torch.float32)
        optimizer = FOAM(net.parameters(), level=0, state_offload=state_offload)
        train(net, optimizer, range(1))  # compiles, makes the state
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train(net, optimizer, range(1, 3))
        peaks.append(torch.cuda.max_memory_allocated())
        assert torch.cuda.memory_allocated() == before  # no copy of the state stays
        del net, optimizer
    of_one = 2 * 4 * SIZE * SIZE
    assert peaks[0] - peaks[1] == pytest.approx((COUNT - 1) * of_one, rel=0.01)


def accumulate(net, optimizer, num_steps, sums=None):
    random = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        for _ in range(3):
            x = torch.randn(64, SIZE, generator=random).to("cuda", next(net.parameters()).dtype)
            with sums.collect() if sums else nullcontext():
                net(x).float().square().mean().backward()
        if sums:
            sums.update(optimizer)
        else:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_gradients_summed_in_pinned_memory_give_the_same_weights_and_a_lower_peak(dtype):
    nets, peaks = [], []
    for is_offloaded in (False, True):
        net = network(dtype)
        optimizer = FOAM(net.parameters(), level=1)
        sums = HostGradients(net.parameters()) if is_offloaded else None
        accumulate(net, optimizer, 1, sums)  # compiles, makes the state
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        accumulate(net, optimizer, 2, sums)
        peaks.append(torch.cuda.max_memory_allocated())
        nets.append([param.detach().cpu() for param in net.parameters()])
        if sums:
            assert all(each.is_pinned() for each in sums.tensors()[:-1])
        del net, optimizer
    for kept, offloaded in zip(*nets, strict=True):
        assert torch.equal(kept, offloaded)
    of_one = dtype.itemsize * SIZE * SIZE
    assert peaks[0] - peaks[1] > (COUNT - 3) * of_one


def test_lightning_leaves_a_loaded_state_in_host_memory():
    from lightning.pytorch.strategies import SingleDeviceStrategy

    net = network(torch.float32)
    saving = FOAM(net.parameters())
    train(net, saving, range(1))
    saved = saving.state_dict()
    optimizer = FOAM(net.parameters(), state_offload=True)
    strategy = SingleDeviceStrategy(device=torch.device("cuda", 0))
    strategy._optimizers = [optimizer]
    strategy.load_optimizer_state_dict({"optimizer_states": [saved]})
    for kept, offloaded in zip(moments(saving), moments(optimizer), strict=True):
        assert offloaded.is_pinned()
        assert torch.equal(kept.cpu(), offloaded)

"""Small parameters and gradients that repeat, for the tests of the optimizer."""

import io
import socket
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

SHAPES = [(8, 30), (3, 11), (7,), (), (2, 3, 10)]


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in shapes]


def train(optimizer, steps):
    """Take the given steps; the gradients depend on the number of the step alone."""
    for step in steps:
        random = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for param in group["params"]:
                grad = torch.randn(param.shape, generator=random).to(param.dtype)
                param.grad = grad.to(param.device)
        optimizer.step()
        optimizer.zero_grad()


def moments(optimizer):
    """List the tensors of the state."""
    states = optimizer.state.values()
    return [value for state in states for key, value in state.items() if key != "step"]


def all_equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def through_a_file(content):
    """Save and load as a checkpoint file does."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextmanager
def mesh_of_one_process():
    from torch.distributed.device_mesh import init_device_mesh

    url = f"tcp://localhost:{free_port()}"
    dist.init_process_group("gloo", init_method=url, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def assert_same(left, right):
    """Compare to the last bit what a `state_dict` may hold."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right

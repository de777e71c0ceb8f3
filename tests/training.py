"""Small parameters and gradients that repeat, for the tests of the optimizer."""

import torch
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
                param.grad = torch.randn(param.shape, generator=random).to(param.dtype)
        optimizer.step()


def all_equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))

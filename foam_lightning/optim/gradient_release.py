"""Gradient release: update each parameter inside backward, then free its gradient."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from foam_lightning.errors import ConfigError
from foam_lightning.optim.foam import FOAM


class BackwardGuard(Protocol):
    """Checks that run before gradients are released: an update inside backward cannot be undone."""

    def allows_backward(self, loss: Tensor) -> bool:
        """Return whether backward may run from this loss."""

    def make_finite_(self, grad: Tensor) -> None:
        """Make a gradient finite, in place."""


def release_gradients(
    optimizer: FOAM, before_update: Callable[[Tensor], None] = lambda _: None
) -> ExitStack:
    """Update every parameter as soon as backward has its gradient, and free the gradient.

    Holds from the call on; used as `with release_gradients(optimizer):`, until the block ends.
    Meanwhile only gradients that backward is still summing up are alive. The update is the one that
    `optimizer.step()` would make with the options that the parameter's group has at that moment, so
    the weights are equal to the last bit. `step()` is still called after every backward: it finds
    no gradients, and hooks on it, such as learning-rate schedules, run as usual. A parameter that
    is used more than once is updated once, after the last part of its gradient; one that backward
    does not reach is not updated.

    Does not combine with what needs all gradients at once: clipping by their global norm
    (`clip_norm` of FOAM clips each by its own), a gradient scaler, and data parallel training that
    averages gradients after backward. `gradient_offload` sums released gradients in host memory,
    where they can also accumulate and be clipped together.

    Source: LOMO (Lv et al. 2023, arXiv:2306.09782), section 3.1, with FOAM instead of SGD.

    Args:
        optimizer: Updates its own parameters.
        before_update: Called with every gradient before its update; may change it in place.

    Returns:
        A context manager that ends the release on leaving it, or by its method `close()`.

    Raises:
        ConfigError: Inside backward, if a parameter gets a second gradient before
            `optimizer.step()`: the first is gone, so gradients cannot accumulate.
    """
    # By index, because loading a state replaces the groups.
    group_indices = {
        param: index
        for index, group in enumerate(optimizer.param_groups)
        for param in group["params"]
        if param.requires_grad
    }
    updated = set[Tensor]()

    @_disable_dynamo  # see `foam`
    @torch.no_grad()
    def update(param: Tensor) -> None:
        if param in updated:
            raise ConfigError(
                f"a parameter of shape {tuple(param.shape)} got a second gradient before "
                "optimizer.step(), but gradient release already used and freed the first; call "
                "step() after every backward (accumulate_grad_batches 1)"
            )
        updated.add(param)
        if param.grad is None:  # a second release of the same optimizer: the first has updated it
            return
        before_update(param.grad)
        optimizer.update(param, optimizer.param_groups[group_indices[param]])
        param.grad = None

    with ExitStack() as hooks:
        hooks.enter_context(optimizer.register_step_post_hook(lambda *_: updated.clear()))
        for param in group_indices:
            hooks.enter_context(param.register_post_accumulate_grad_hook(update))
        return hooks.pop_all()

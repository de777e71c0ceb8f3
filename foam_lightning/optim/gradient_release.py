"""Gradient release: each parameter is updated inside backward, and its gradient freed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from foam_lightning.errors import ConfigError
from foam_lightning.optim.foam import FOAM


class Gate(Protocol):
    """What gradients that are released pass: once they are spent, no step can be taken back."""

    def opens(self, loss: Tensor) -> bool:
        """Tell whether a loss may go backward."""

    def mend_(self, grad: Tensor) -> None:
        """Make a gradient finite, in place."""


@contextmanager
def release_gradients(
    optimizer: FOAM, mend_: Callable[[Tensor], None] = lambda _: None
) -> Iterator[None]:
    """Update every parameter as soon as backward has its gradient, and free the gradient.

    Within this context gradients never pile up: only those of which a part is still to come are
    alive at once. The update is the one that `optimizer.step()` would make, with the options that
    the parameter's group has at that moment, so the weights are the same, in float32 to the last
    bit. `step()` is still called after every backward: it finds nothing left to update, and what
    counts steps, such as a learning-rate schedule, goes on as ever. A parameter that is used more
    than once is updated once, after the last part of its gradient; one that a backward does not
    reach is left as it is.

    What needs the gradients of all parameters at once finds none: clipping by their common norm
    (`clip_norm` of FOAM clips each by its own), a gradient scaler, and copies of the model that
    average their gradients after backward, as in data parallel training.

    Source: LOMO (Lv et al. 2023, arXiv:2306.09782), section 3.1, with FOAM for its SGD.

    Args:
        optimizer: Its parameters are the ones that are updated.
        mend_: Called with every gradient before it is spent; may change it in place.

    Raises:
        ConfigError: Inside backward, if a parameter gets a gradient again before
            `optimizer.step()`: its first gradient is gone, so nothing can be accumulated.
    """
    # By number, because loading a state replaces the groups.
    group_numbers = {
        param: number
        for number, group in enumerate(optimizer.param_groups)
        for param in group["params"]
        if param.requires_grad
    }
    updated = set[Tensor]()

    @torch.no_grad()
    def update(param: Tensor) -> None:
        if param in updated:
            raise ConfigError(
                f"a parameter of shape {tuple(param.shape)} got a second gradient before "
                "optimizer.step(), and gradient release has spent the first; step after every "
                "backward: accumulate_grad_batches 1"
            )
        updated.add(param)
        assert param.grad is not None
        mend_(param.grad)
        optimizer.update(param, optimizer.param_groups[group_numbers[param]])
        param.grad = None

    with ExitStack() as hooks:
        hooks.enter_context(optimizer.register_step_post_hook(lambda *_: updated.clear()))
        for param in group_numbers:
            hooks.enter_context(param.register_post_accumulate_grad_hook(update))
        yield

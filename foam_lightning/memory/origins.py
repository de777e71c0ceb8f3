"""Which module runs now, forward, backward or once more, for whoever asks where memory goes."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from foam_lightning.memory.tracker import StorageTracker

_WRAPPER = "model."


def qualified(name: str) -> str:
    """Name a part of a LightningModule as its parameters are named without the module around."""
    return name.removeprefix(_WRAPPER)


@contextmanager
def modules_noted(
    tracker: StorageTracker, modules: Iterable[tuple[str, nn.Module]]
) -> Iterator[None]:
    """Tell the tracker which module runs.

    A forward pass in the middle of backward is one that is recomputed.

    Args:
        tracker: Its `place` and `phase` change.
        modules: By name; of others it is not told.
    """
    names = {module: qualified(name) for name, module in modules}
    before: list[tuple[str, str]] = []

    def enter(module: nn.Module, *_: object) -> None:
        if module in names:
            before.append((tracker.place, tracker.phase))
            phase = "recompute" if tracker.phase == "backward" else tracker.phase
            tracker.place, tracker.phase = names[module], phase

    def leave(module: nn.Module, *_: object) -> None:
        if module in names:
            tracker.place, tracker.phase = before.pop()

    with ExitStack() as hooks:
        hooks.enter_context(register_module_forward_pre_hook(enter))
        # Recomputation ends as soon as it has what it needs, by an exception.
        hooks.enter_context(register_module_forward_hook(leave, always_call=True))
        yield

"""What an optimizer takes, measured over a training that does only what the measure needs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tuner.comparison.profile import measure
from tuner.trials.runner import StepClock


class TrialRunner:
    """A training of one compiled step, as some optimizers take them."""

    def train(self, plan: Any, *, num_steps: int, callbacks: list[Any]) -> None:
        module: Any = torch.nn.Linear(256, 256)
        optimizer = torch.optim.Adam(module.parameters())
        trainer: Any = SimpleNamespace(optimizers=[optimizer])
        update = torch.compile(lambda x: x * 2, fullgraph=True, backend="eager")
        module.device = torch.device("cpu")
        for callback in callbacks:
            callback.on_train_start(trainer, module)
        for number in range(num_steps):
            loss = module(update(torch.ones(4, 256))).sum()
            loss.backward()
            optimizer.step()
            trainer.global_step = number + 1
            if isinstance(callbacks[0], StepClock):
                callbacks[0].on_train_batch_end(trainer, module, {"loss": loss}, None, number)
        for callback in callbacks:
            callback.on_train_end(trainer, module)


@pytest.mark.filterwarnings("ignore")
def test_memory_is_watched_where_steps_are_compiled() -> None:
    found = measure({"adam": (TrialRunner(), None)})["adam"]  # type: ignore[arg-type]
    weights = 4 * (256 * 256 + 256)
    assert found.state_bytes == pytest.approx(2 * weights, abs=16)
    assert 4 * weights <= found.peak_bytes < 6 * weights
    assert found.step_seconds > 0


class FailingBench(TrialRunner):
    """The same, but memory runs out in its first step."""

    def train(self, plan: Any, *, num_steps: int, callbacks: list[Any]) -> None:
        def fail(*_: Any) -> None:
            for callback in callbacks:
                callback.on_exception(None, None, error)
            raise error

        error = RuntimeError("out of memory")
        torch.optim.Adam.step, step = fail, torch.optim.Adam.step  # type: ignore[method-assign]
        try:
            super().train(plan, num_steps=num_steps, callbacks=callbacks)
        finally:
            torch.optim.Adam.step = step  # type: ignore[method-assign]


def test_nothing_is_watched_any_more_after_a_failure() -> None:
    resize = torch.UntypedStorage.resize_
    with pytest.raises(RuntimeError, match="out of memory"):
        measure({"adam": (FailingBench(), None)})  # type: ignore[arg-type]
    assert _get_current_dispatch_mode() is None
    assert torch.UntypedStorage.resize_ is resize

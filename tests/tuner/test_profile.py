"""The memory and speed of an optimizer, profiled on a small module in place of a run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tuner.comparison.profile import profile_optimizers
from tuner.trials.runner import StepClock


class SmallRunner:
    """Trains a layer by Adam, with a compiled function in each step, as adamw8bit has one."""

    optimizer = torch.optim.Adam

    def train(self, plan: Any, *, num_steps: int, callbacks: list[Any]) -> None:
        module: Any = torch.nn.Linear(256, 256)
        optimizer = self.optimizer(module.parameters())
        trainer: Any = SimpleNamespace(optimizers=[optimizer])
        double = torch.compile(lambda x: x * 2, fullgraph=True, backend="eager")
        module.device = torch.device("cpu")
        for callback in callbacks:
            callback.on_train_start(trainer, module)
        for number in range(num_steps):
            loss = module(double(torch.ones(4, 256))).sum()
            loss.backward()
            try:
                optimizer.step()
            except RuntimeError as error:
                for callback in callbacks:
                    callback.on_exception(trainer, module, error)
                raise
            trainer.global_step = number + 1
            if isinstance(callbacks[0], StepClock):
                callbacks[0].on_train_batch_end(
                    trainer, module, {"loss": loss.detach()}, None, number
                )
        for callback in callbacks:
            callback.on_train_end(trainer, module)


def test_memory_and_time_are_measured_although_steps_are_compiled() -> None:
    found = profile_optimizers({"adam": (SmallRunner(), None)})["adam"]  # type: ignore[arg-type]
    weights = 4 * (256 * 256 + 256)
    assert found.state_bytes == pytest.approx(2 * weights, abs=16)
    assert 4 * weights <= found.peak_bytes < 6 * weights
    assert found.step_seconds > 0


class FailingAdam(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("out of memory")


class FailingRunner(SmallRunner):
    optimizer = FailingAdam


def test_nothing_is_tracked_any_more_after_a_failure() -> None:
    resize = torch.UntypedStorage.resize_
    with pytest.raises(RuntimeError, match="out of memory"):
        profile_optimizers({"adam": (FailingRunner(), None)})  # type: ignore[arg-type]
    assert _get_current_dispatch_mode() is None
    assert torch.UntypedStorage.resize_ is resize

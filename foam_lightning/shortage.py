"""Memory that ran out in a run: where, at which step, by which plan."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer

from foam_lightning.errors import FoamError, first_line
from foam_lightning.memory.device import is_out_of_memory
from foam_lightning.plan import FoldPlan


class MemoryShortageError(FoamError):
    """A run needed more memory than there was.

    Args:
        where: What ran, such as "training".
        plan: What it ran by.
        step: Optimizer steps it had done.
        reason: What was refused, in one line.
    """

    exit_code = 3

    def __init__(self, where: str, plan: FoldPlan, step: int, reason: str) -> None:
        self.where = where
        self.plan = plan
        self.step = step
        self.reason = reason
        super().__init__(f"memory ran out in {where}, after step {step}: {reason}")


@contextmanager
def naming_shortage(where: str, plan: FoldPlan, trainer: Trainer) -> Iterator[None]:
    """Turn the error of a device without memory into one that says what ran.

    Args:
        where: What runs in this context, such as "training".
        plan: What it runs by.
        trainer: Knows the step.

    Raises:
        MemoryShortageError: The device had no memory left.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The text of torch goes on about its allocator.
        reason = first_line(error).split(". GPU ")[0]
        raise MemoryShortageError(where, plan, trainer.global_step, reason) from error

"""Whether to take a training step, by its numbers: take it, skip it, roll back, or stop."""

import math
from dataclasses import asdict, dataclass
from enum import Enum, auto
from typing import Any

# A spike is seen beside the mean of the last steps; before there are as many, there is none.
_STEPS_OF_MEAN = 50
_STEPS_BEFORE_SPIKES = 20

# What the settings say, beside what is counted.
LIMITS = ("max_skipped_steps", "spike_nats", "max_rollbacks")


class Verdict(Enum):
    """What to do with a step."""

    TAKE = auto()
    SKIP = auto()
    ROLL_BACK = auto()
    STOP = auto()


@dataclass(kw_only=True)
class Judge:
    """Judge every step of a run by its loss and by whether its gradients are finite.

    A step with a number that is not finite is skipped. So many of them in a row are no accident:
    then the run rolls back to its last checkpoint, if it may, or stops. A spike is a finite loss
    far above the mean of the steps before, and is looked for only where the run may roll back.

    Attributes:
        max_skipped_steps: Steps in a row that are skipped; one more, and the run stops.
        spike_nats: How far above the running mean a loss is a spike.
        max_rollbacks: Over the whole run; 0 looks for no spikes.
        skipped: Steps that were not taken so far, those of rollbacks among them.
        rollbacks: So far.
    """

    max_skipped_steps: int
    spike_nats: float
    max_rollbacks: int
    skipped: int = 0
    rollbacks: int = 0
    in_a_row: int = 0
    mean: float = 0.0
    num_taken: int = 0

    def accepts(self, loss: float) -> bool:
        """Tell whether a loss is finite and no spike."""
        return math.isfinite(loss) and not self._spikes(loss)

    def judge(self, loss: float, *, has_finite_gradients: bool, can_roll_back: bool) -> Verdict:
        """Judge a step, and count it.

        Args:
            loss: In nats per token, over the whole step.
            has_finite_gradients: All of them.
            can_roll_back: There is a checkpoint.
        """
        if self.accepts(loss) and has_finite_gradients:
            self.in_a_row = 0
            self.num_taken += 1
            self.mean += (loss - self.mean) / min(self.num_taken, _STEPS_OF_MEAN)
            return Verdict.TAKE
        self.skipped += 1
        self.in_a_row += 1
        is_spike = has_finite_gradients and math.isfinite(loss)
        if self.in_a_row <= self.max_skipped_steps and not (is_spike and can_roll_back):
            return Verdict.SKIP
        if can_roll_back and self.rollbacks < self.max_rollbacks:
            self.in_a_row = 0
            self.rollbacks += 1
            return Verdict.ROLL_BACK
        return Verdict.STOP

    def state_dict(self) -> dict[str, Any]:
        """Give the counts, which a run that goes on takes up again."""
        return {key: value for key, value in asdict(self).items() if key not in LIMITS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the counts; the limits are those of this run."""
        for key, value in state.items():
            setattr(self, key, value)

    def _spikes(self, loss: float) -> bool:
        return (
            self.max_rollbacks > 0
            and self.num_taken >= _STEPS_BEFORE_SPIKES
            and loss > self.mean + self.spike_nats
        )

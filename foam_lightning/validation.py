"""Where the numbers of the settings may lie."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foam_lightning.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """An interval of numbers; NaN, infinity and integers that no float holds lie in none.

    Args:
        low: The least number.
        high: The largest one.
        without_low: The least number itself is out.
        without_high: The largest number itself is out.
    """

    low: float = 0
    high: float = sys.float_info.max
    without_low: bool = False
    without_high: bool = False

    def holds(self, number: float) -> bool:
        """Tell whether the number lies within."""
        return (
            self.low <= number <= self.high
            and not (self.without_low and number == self.low)
            and not (self.without_high and number == self.high)
        )

    def __str__(self) -> str:
        low = f"above {self.low}" if self.without_low else f"{self.low} or more"
        if self.high == sys.float_info.max:
            return f"a finite number {low}"
        return f"{low} and {'below' if self.without_high else 'at most'} {self.high}"


POSITIVE = Range(without_low=True)
_FRACTION = Range(0, 1)
_BETA = Range(0, 1, without_high=True)
# Upper ends of sizes are far above any model: beyond them lie overflows and endless waits.
MODEL: Mapping[str, Range] = {
    "hidden_size": Range(1, 2**20),
    "intermediate_size": Range(1, 2**20),
    "num_hidden_layers": Range(1, 2048),
    "num_attention_heads": Range(1, 2**16),
    "num_key_value_heads": Range(1, 2**16),
    "vocab_size": Range(1, 2**24),
    "max_position_embeddings": Range(1, 2**30),
    "lr": POSITIVE,
    "betas": _BETA,
    "eps": Range(),
    "weight_decay": Range(),
    "level": Range(0, 62),  # the widest block that 64 bits can count
    "scale": POSITIVE,
    "unfolded_scale": POSITIVE,
    "residual_scale": Range(),
    "clip_norm": POSITIVE,
    "max_skipped_steps": Range(0, 2**31),
    "max_rollbacks": Range(0, 2**31),
    "spike_nats": POSITIVE,
    "warmup_fraction": _FRACTION,
    "final_lr_fraction": _FRACTION,
}
DATA: Mapping[str, Range] = {
    "vocab_size": Range(1, 2**24),
    "sequence_length": Range(2, 2**24),  # a single token predicts nothing
    "batch_size": Range(1, 2**24),
    "micro_batch_size": Range(1, 2**24),
    "validation_sequences": Range(1, 2**31),
    "num_workers": Range(0, 1024),
}
WRITING: Mapping[str, Range] = {"max_new_tokens": Range(1, 2**31), "temperature": Range()}
TRAINER: Mapping[str, Range] = {
    "max_steps": Range(1, 2**31),
    "max_epochs": Range(1, 2**31),
    "num_nodes": Range(1, 2**16),
    "limit_train_batches": POSITIVE,
    "limit_val_batches": POSITIVE,
    "val_check_interval": POSITIVE,
    "log_every_n_steps": Range(),
    "gradient_clip_val": Range(),
}
SEED = Range(0, 2**32 - 1)


def check_ranges(section: str, settings: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Refuse numbers that are out of range; texts, and settings that are not set, are left alone.

    Args:
        section: What the names begin with, such as "model.".
        settings: Numbers, and sequences of numbers, by name; those without a range are left alone.
        ranges: By name.

    Raises:
        ConfigError: Names the first.
    """
    for name, range_ in ranges.items():
        value = settings.get(name)
        numbers = value if isinstance(value, list | tuple) else (value,)
        if not all(range_.holds(one) for one in numbers if isinstance(one, int | float)):
            raise ConfigError(f"{section}{name} must be {range_}, got {value}")


def check_pattern(place: str, pattern: str) -> None:
    """Refuse what is no regular expression.

    Raises:
        ConfigError: It is none.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{place} {pattern!r} is no regular expression ({error}); mend it"
        ) from error

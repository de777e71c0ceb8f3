"""Ranges of the numbers among the settings."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foam_lightning.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers.

    Args:
        low: The smallest number.
        high: The largest number; by default the largest float.
        is_low_open: The smallest number itself is excluded.
        is_high_open: The largest number itself is excluded.
    """

    low: float = 0
    high: float = sys.float_info.max
    is_low_open: bool = False
    is_high_open: bool = False

    def holds(self, number: float) -> bool:
        """Return whether a number is in the interval; NaN never is."""
        return (
            self.low <= number <= self.high
            and not (self.is_low_open and number == self.low)
            and not (self.is_high_open and number == self.high)
        )

    def __str__(self) -> str:
        low = f"above {self.low}" if self.is_low_open else f"{self.low} or more"
        if self.high == sys.float_info.max:
            return f"a finite number {low}"
        return f"{low} and {'below' if self.is_high_open else 'at most'} {self.high}"


POSITIVE = Range(is_low_open=True)
_FRACTION = Range(0, 1)
_BETA = Range(0, 1, is_high_open=True)
# Upper bounds are far above any model and below the sizes that overflow or never finish.
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
    "level": Range(0, 62),  # a block of 2**62 columns is the largest that int64 can count
    "scale": POSITIVE,
    "unfolded_scale": POSITIVE,
    "residual_scale": Range(),
    "clip_norm": POSITIVE,
    "max_skipped_steps": Range(0, 2**31),
    "max_rollbacks": Range(0, 2**31),
    "spike_nats": POSITIVE,
    "warmup_fraction": _FRACTION,
    "decay_fraction": _FRACTION,
    "final_lr_fraction": _FRACTION,
}
DATA: Mapping[str, Range] = {
    "vocab_size": Range(1, 2**24),
    "sequence_length": Range(2, 2**24),  # one token has no next token to predict
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
    """Check settings against their ranges.

    Args:
        section: Prefix of the names in the error, such as "model.".
        settings: Values by name. Numbers and sequences of numbers are checked; text and None are
            not.
        ranges: Ranges by name; settings without one are not checked.

    Raises:
        ConfigError: A number is out of range; names the first.
    """
    for name, range_ in ranges.items():
        value = settings.get(name)
        numbers = value if isinstance(value, list | tuple) else (value,)
        if not all(range_.holds(one) for one in numbers if isinstance(one, int | float)):
            raise ConfigError(f"{section}{name} must be {range_}, got {value}")


def check_pattern(setting: str, pattern: str) -> None:
    """Check a regular expression.

    Args:
        setting: The name of the setting.
        pattern: Its value.

    Raises:
        ConfigError: It is not a regular expression.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{setting} {pattern!r} is not a regular expression: {error}") from error

"""Which options a parameter group of FOAM may have."""

import math
from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor

from foam_lightning.optim.fold import check_level
from foam_lightning.optim.state import STATE_DTYPES, SecondMoment

# Arguments of torch.optim.AdamW that FOAM does not have, and what to do instead of setting them.
ONLY_IN_ADAMW = {
    "foreach": "fused=True is the fast update of FOAM",
    "amsgrad": "use torch.optim.AdamW for it",
    "capturable": "FOAM counts steps on the host, so a CUDA graph cannot capture them",
    "differentiable": "use torch.optim.AdamW for it",
}


def check_adamw_options(**options: object) -> None:
    """Refuse what only torch.optim.AdamW does; there None and False change nothing.

    Args:
        options: By name, others than those of AdamW alone included.

    Raises:
        ValueError: One is set.
    """
    for name, instead in ONLY_IN_ADAMW.items():
        if options.get(name):
            raise ValueError(f"FOAM does not support {name}={options[name]}; {instead}")


def check_options(options: Mapping[str, Any]) -> None:
    """Check the options of a parameter group.

    Args:
        options: By the names of the arguments of `FOAM`.

    Raises:
        ValueError: One is out of range.
    """
    for name in ("lr", "eps", "weight_decay", "scale", "residual_scale"):
        value = options[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {[*value.shape]}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    betas = options["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    check_level(options["level"])
    clip_norm = options["clip_norm"]
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(f"clip_norm must be finite and above 0, or None, got {clip_norm}")
    if options["second_moment"] not in get_args(SecondMoment):
        raise ValueError(
            f"second_moment must be one of {', '.join(get_args(SecondMoment))}, "
            f"got {options['second_moment']!r}"
        )
    if options["state_dtype"] not in STATE_DTYPES:
        raise ValueError(
            f"state_dtype must be one of {', '.join(map(str, STATE_DTYPES))}, "
            f"got {options['state_dtype']}"
        )

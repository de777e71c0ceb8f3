"""The optimizers that `optimizer_step` times, one a row, all with the same settings and weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from foam_lightning.optim.baselines import BaselineSettings, create_baseline
from foam_lightning.optim.foam import FOAM
from foam_lightning.optim.groups import foldable_shapes, param_groups

FUSED = "torch AdamW, fused"  # what every row is compared with
FOLDED = "FOAM level 2"  # the default level
LR = 1e-4
SCALE = 0.25


@dataclass(frozen=True)
class Weights:
    """The weights that all rows update: parameters with gradients, by qualified name."""

    named: Mapping[str, torch.nn.Parameter]
    num_heads: int

    @classmethod
    def draw(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        num_heads: int,
        *,
        device: str,
        dtype: torch.dtype,
        seed: int,
    ) -> "Weights":
        stream = torch.Generator(device).manual_seed(seed)
        named = {}
        for name, shape in shapes.items():
            weight, grad = (
                torch.empty(shape, device=device, dtype=dtype).normal_(std=std, generator=stream)
                for std in (0.02, 1e-3)
            )
            named[name] = torch.nn.Parameter(weight)
            named[name].grad = grad
        return cls(named, num_heads)

    @cached_property
    def matrices(self) -> dict[str, torch.nn.Parameter]:
        """Those that FOAM folds and that low-rank baselines project."""
        return {name: self.named[name] for name in foldable_shapes(self.named.items())}

    @property
    def rest(self) -> list[torch.nn.Parameter]:
        return [p for name, p in self.named.items() if name not in self.matrices]

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.named.values() if p.grad is not None]

    @property
    def width(self) -> int:
        return min(min(p.shape) for p in self.matrices.values())

    @property
    def device(self) -> str:
        return next(iter(self.named.values())).device.type

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.named.values())).dtype

    @property
    def num_elements(self) -> int:
        return sum(math.prod(p.shape) for p in self.named.values())


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: As in the table.
        make: Creates the optimizers.
        compiled_on: Devices on which it uses torch.compile.
        package: Package it needs besides torch. Imported before timing begins, so that a missing
            or broken one fails in its own row.
        is_slow_on_cpu: A step of large matrices takes a minute or more on a CPU.
    """

    name: str
    make: Callable[[Weights], list[Optimizer]]
    compiled_on: tuple[str, ...] = ()
    package: str | None = None
    is_slow_on_cpu: bool = False


def _adamw(weights: Weights, *, fused: bool = False, foreach: bool = False) -> list[Optimizer]:
    return [AdamW(weights.named.values(), LR, weight_decay=0.0, fused=fused, foreach=foreach)]


def _baseline(weights: Weights, name: str) -> list[Optimizer]:
    settings = BaselineSettings(lr=LR, hidden_size=weights.width, num_heads=weights.num_heads)
    return [create_baseline(name, weights.named.items(), settings)]


def _galore(weights: Weights) -> list[Optimizer]:
    (optimizer,) = _baseline(weights, "galore")
    # The first matrix computes its basis by SVD in the first step. The others get a random one: a
    # step costs the same, and hundreds of SVDs would take longer than everything else.
    for matrix in list(weights.matrices.values())[1:]:
        projector = optimizer.state[matrix]["projector"]
        projector.update_ortho_matrix(matrix.detach(), from_random_matrix=True)
    return [optimizer]


def _foam(weights: Weights, level: int, **options: Any) -> list[Optimizer]:
    levels = dict.fromkeys(weights.matrices, level)
    scales = dict.fromkeys(levels, SCALE)
    groups = param_groups(weights.named.items(), levels, scales, weight_decay=0.0)
    return [FOAM(groups, LR, **{"state_dtype": weights.dtype, **options})]


ROWS = (
    Row(FUSED, partial(_adamw, fused=True)),
    Row("torch AdamW, foreach", partial(_adamw, foreach=True)),
    Row("torch AdamW, loop", _adamw),
    Row(
        "torchao AdamW8bit",
        partial(_baseline, name="adamw8bit"),
        ("cpu", "cuda"),
        package="torchao.optim",
    ),
    Row("GaLore", _galore, package="pytorch_optimizer"),
    Row("APOLLO", partial(_baseline, name="apollo"), package="pytorch_optimizer"),
    Row("Adam-mini", partial(_baseline, name="adam_mini"), package="pytorch_optimizer"),
    Row("torch Muon", partial(_baseline, name="muon"), is_slow_on_cpu=True),
    *(Row(f"FOAM level {level}", partial(_foam, level=level)) for level in (0, 1, 2, 3, 4, 8)),
    Row("FOAM row fold", partial(_foam, level=20)),
    Row("FOAM level 2, eager", partial(_foam, level=2, fused=False)),
    Row("FOAM level 2, int8", partial(_foam, level=2, state_dtype=torch.int8)),
)

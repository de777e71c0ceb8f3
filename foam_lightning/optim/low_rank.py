"""Optimizers that project the gradient of a matrix to a lower rank: GaLore, APOLLO and Fira.

Imported only where pytorch-optimizer is installed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_optimizer import APOLLO, Fira, GaLore
from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from foam_lightning.optim.plain_state import PlainState

# As in the papers: rank is a quarter of the smaller side, and projections last 200 steps.
RANK_DIVISOR = 4
UPDATE_GAP = 200


class SeededProjector(GaLoreProjector):
    """A projector with its own random stream, so that a resumed run draws the same projections.

    Args:
        seed: Of the first draw; each draw uses the next.
        options: As of the library.
    """

    def __init__(self, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.seed = seed

    @override
    def update_ortho_matrix(self, x: Tensor, from_random_matrix: bool) -> None:
        """Compute the projection of a gradient (R, C) by SVD, or draw it at random."""
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(self.seed)
            super().update_ortho_matrix(x, from_random_matrix)
        self.seed += 1


class _GaLore(PlainState, GaLore):
    new_object = SeededProjector


class _Apollo(PlainState, APOLLO):
    new_object = SeededProjector


class _Fira(PlainState, Fira):
    new_object = SeededProjector


# Class, scale of the update as in the papers, and options of its own.
_KINDS: Mapping[str, tuple[type[Optimizer], float, dict[str, Any]]] = {
    "galore": (_GaLore, 0.25, {}),
    "apollo": (_Apollo, 1.0, {"scale_type": "channel"}),
    "fira": (_Fira, 0.25, {}),
}


def create_low_rank(
    name: str,
    matrices: Sequence[Tensor],
    others: Sequence[Tensor],
    *,
    weight_decay: float,
    **options: Any,
) -> Optimizer:
    """Create GaLore, APOLLO or Fira.

    Args:
        name: galore, apollo or fira.
        matrices: Projected, each to a quarter of its smaller side.
        others: Updated by Adam.
        weight_decay: Of the matrices; the others have none.
        options: lr, betas and eps.
    """
    kind, scale, own = _KINDS[name]
    by_rank: dict[int, list[Tensor]] = {}
    for matrix in matrices:
        by_rank.setdefault(max(1, min(matrix.shape) // RANK_DIVISOR), []).append(matrix)
    projections = [
        {"rank": rank, "update_proj_gap": UPDATE_GAP, "scale": scale, "projection_type": "std"}
        for rank in by_rank
    ]
    groups = [
        {"params": params, "weight_decay": weight_decay, **projection}
        for params, projection in zip(by_rank.values(), projections, strict=True)
    ]
    groups += [{"params": others, "weight_decay": 0.0}] if others else []
    optimizer = kind(groups, **options, **own)
    index = 0
    for group, projection in zip(optimizer.param_groups, projections, strict=False):
        for matrix in group["params"]:
            optimizer.state[matrix]["projector"] = SeededProjector(index << 20, **projection)
            index += 1
    return optimizer

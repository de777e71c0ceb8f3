"""GaLore, APOLLO and Fira from pytorch-optimizer, which is imported with this file."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pytorch_optimizer import APOLLO, Fira, GaLore
from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from foam_lightning.optim.portable import PlainState

# The shares of the papers: a rank of a quarter of the width, a new projection every 200 steps.
RANK_SHARE = 4
UPDATE_GAP = 200


class Projector(GaLoreProjector):
    """A projection whose random draws are its own, so that a resumed run draws the same ones.

    Args:
        seed: Of the first draw; each draw takes the next.
        options: As of the library.
    """

    def __init__(self, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.seed = seed

    @override
    def update_ortho_matrix(self, x: Tensor, from_random_matrix: bool) -> None:
        """Find the projection of a gradient (R, C): by SVD, or drawn at random."""
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(self.seed)
            super().update_ortho_matrix(x, from_random_matrix)
        self.seed += 1


class _GaLore(PlainState, GaLore):
    new_object = Projector


class _Apollo(PlainState, APOLLO):
    new_object = Projector


class _Fira(PlainState, Fira):
    new_object = Projector


_KINDS: Mapping[str, tuple[type[Optimizer], float, dict[str, Any]]] = {
    "galore": (_GaLore, 0.25, {}),
    "apollo": (_Apollo, 1.0, {"scale_type": "channel"}),
    "fira": (_Fira, 0.25, {}),
}


def new_projected(
    name: str,
    matrices: Sequence[Tensor],
    rest: Iterable[Tensor],
    *,
    weight_decay: float,
    **options: Any,
) -> Optimizer:
    """Make one of the optimizers that project the gradient of a matrix to a lower rank.

    The scale of the update is that of the papers: .25 for GaLore and Fira, 1 for APOLLO.

    Args:
        name: galore, apollo or fira.
        matrices: What is projected, each to a quarter of its smaller side.
        rest: What is left to Adam.
        weight_decay: Of the matrices; the rest has none.
        options: lr, betas and eps.
    """
    kind, scale, own = _KINDS[name]
    by_rank: dict[int, list[Tensor]] = {}
    for matrix in matrices:
        by_rank.setdefault(max(1, min(matrix.shape) // RANK_SHARE), []).append(matrix)
    projections = [_projection(rank, scale) for rank in by_rank]
    groups = [
        {"params": of_rank, "weight_decay": weight_decay, **projection}
        for of_rank, projection in zip(by_rank.values(), projections, strict=True)
    ]
    others = list(rest)
    groups += [{"params": others, "weight_decay": 0.0}] if others else []
    optimizer = kind(groups, **options, **own)
    index = 0
    for group, projection in zip(optimizer.param_groups, projections, strict=False):
        for matrix in group["params"]:
            optimizer.state[matrix]["projector"] = Projector(index << 20, **projection)
            index += 1
    return optimizer


def _projection(rank: int, scale: float) -> dict[str, Any]:
    return {
        "rank": rank,
        "update_proj_gap": UPDATE_GAP,
        "scale": scale,
        "projection_type": "std",
    }

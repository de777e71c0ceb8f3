"""The optimizers that FOAM is compared with, by name, each from the library that has it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, ClassVar, get_args

import torch
from pytorch_optimizer import APOLLO, Fira, GaLore
from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from typing_extensions import override

from foam_lightning.errors import ConfigError
from foam_lightning.optim.groups import is_foldable
from foam_lightning.settings import DEFAULT_EXCLUDE, OptimizerName

StateDict = dict[str, Any]
_TENSOR, _OBJECT = "plain_tensor", "plain_object"


class PlainState(Optimizer):
    """An optimizer whose `state_dict` holds plain tensors; goes before a library's class.

    A checkpoint is then read without the library that wrote it, and with `weights_only=True`. The
    state may hold tensors made of others (quantised ones) and, with `new_object`, objects whose
    attributes are tensors and simple values.

    Attributes:
        new_object: Makes an empty one of these objects.
    """

    new_object: ClassVar[Callable[[], Any] | None] = None

    @override
    def state_dict(self) -> StateDict:
        """Give the state in plain tensors."""
        return _mapped(super().state_dict(), lambda _, value: _to_plain(value))

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take the state back.

        Args:
            state_dict: From `state_dict()`.
        """
        ours = [param for group in self.param_groups for param in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        devices = {index: param.device for index, param in zip(saved, ours, strict=False)}

        def revive(index: Any, value: Any) -> Any:
            return _revived(value, devices.get(index), type(self).new_object)

        super().load_state_dict(_mapped(state_dict, revive))


def state_bytes(optimizer: Optimizer) -> int:
    """Add up the storages of the state, each once: a view keeps alive all of what it views."""
    storages = [tensor.untyped_storage() for tensor in state_tensors(optimizer)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """List every plain tensor of the state: in containers, in objects, inside other tensors."""
    return [tensor for state in optimizer.state.values() for tensor in _tensors_in(state)]


def _mapped(content: StateDict, change: Callable[[Any, Any], Any]) -> StateDict:
    state = {
        index: {key: change(index, value) for key, value in entries.items()}
        for index, entries in content["state"].items()
    }
    return {**content, "state": state}


def _to_plain(value: Any) -> Any:
    if hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        return {_TENSOR: {name: getattr(value, name) for name in names}, "context": context}
    if hasattr(value, "__dict__") and not isinstance(value, Tensor):
        return {_OBJECT: dict(vars(value))}
    return value


def _revived(value: Any, device: torch.device | None, new_object: Callable[[], Any] | None) -> Any:
    if not isinstance(value, Mapping):
        return value
    if _TENSOR in value:
        from torchao.optim.subclass_8bit import OptimState8bit

        tensors = {name: tensor.to(device) for name, tensor in value[_TENSOR].items()}
        return OptimState8bit.__tensor_unflatten__(tensors, value["context"])
    if _OBJECT in value and new_object is not None:
        revived = new_object()
        for name, entry in value[_OBJECT].items():
            setattr(revived, name, entry.to(device) if isinstance(entry, Tensor) else entry)
        return revived
    return value


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors_in(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors_in(entry)
    elif hasattr(value, "__dict__"):
        yield from _tensors_in(vars(value))


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


OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)
# What a baseline is imported from, and what pip calls it.
_PACKAGES = {
    **dict.fromkeys(
        ("galore", "apollo", "fira", "adam_mini"), ("pytorch_optimizer", "pytorch-optimizer")
    ),
    "adamw8bit": ("torchao", "torchao"),
}
Named = Sequence[tuple[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the baselines share.

    Attributes:
        lr: Peak learning rate.
        betas: Decay of the two moments. Muon keeps its one, .95, for matrices.
        eps: Added to the denominator; GaLore, APOLLO and Fira add it before bias correction.
        weight_decay: Decoupled decay of the matrices that fold; the rest has none.
        matrix_scale: Factor on lr for these matrices under split_adamw.
        exclude: Regular expression on the names of matrices that never fold.
        hidden_size: Width of the residual stream; Adam-mini has a second moment for each head.
        num_heads: Query heads.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    matrix_scale: float = 1.0
    exclude: str = DEFAULT_EXCLUDE
    hidden_size: int
    num_heads: int

    @property
    def of_adam(self) -> dict[str, Any]:
        """What every relative of Adam takes."""
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps}


def installed() -> list[str]:
    """Name the optimizers that can be made here, FOAM first."""
    return [name for name in OPTIMIZERS if find_spec(_PACKAGES.get(name, ("torch",))[0])]


def library(name: str) -> str:
    """Name the package that an optimizer comes from, and its version."""
    package = _PACKAGES.get(name, ("torch", "torch"))[1]
    return f"{package} {version(package)}"


def check(name: str) -> None:
    """Refuse an optimizer that cannot be made.

    Raises:
        ConfigError: The name is unknown, or the package is missing.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"there is no optimizer {name!r}; there are {', '.join(OPTIMIZERS)}")
    if name not in installed():
        package = _PACKAGES[name][1]
        raise ConfigError(
            f"the optimizer {name} is that of {package}, which is not installed; "
            f"pip install {package}, or pip install 'foam-lightning[baselines]' for all of them"
        )


def new_baseline(
    name: str, named_parameters: Iterable[tuple[str, Tensor]], settings: Settings
) -> Optimizer:
    """Make an optimizer other than FOAM; what it treats as a matrix is what FOAM folds.

    - adamw: torch's, fused. Loshchilov and Hutter, arXiv:1711.05101.
    - split_adamw: the same with lr x matrix_scale on matrices, the control of every comparison.
    - galore, apollo, fira: pytorch-optimizer's, on a quarter of the smaller side of each matrix,
      with a new projection every 200 steps and the scales of the papers. Zhao et al.,
      arXiv:2403.03507; Zhu et al., arXiv:2412.05270; Chen et al., arXiv:2410.01623. Departure of
      the library (4.1): APOLLO scales the projected gradient and projects it back, where the paper
      scales the gradient itself.
    - adam_mini: pytorch-optimizer's, with one second moment for each head of q and k and for every
      other matrix. Zhang et al., arXiv:2406.16793, whose later version has one for each row.
    - muon: torch's on matrices, its step as large as AdamW's (match_rms_adamw), so that one rate
      serves both; the rest is left to AdamW. Jordan et al. 2024; Liu et al., arXiv:2502.16982.
    - adamw8bit: torchao's. Dettmers et al., arXiv:2110.02861.

    The state of each resumes exactly: checkpoints hold it as plain tensors, and APOLLO draws its
    projections from seeds of its own.

    Args:
        name: One of `OPTIMIZERS`, except foam.
        named_parameters: As from `model.named_parameters()`; frozen ones are left out.
        settings: What the baselines share.

    Raises:
        ConfigError: The name is unknown, or the package is missing.
    """
    check(name)
    trained = [(key, tensor) for key, tensor in named_parameters if tensor.requires_grad]
    if name == "adam_mini":
        return _new_adam_mini(trained, settings)
    matrices = [p for key, p in trained if is_foldable(key, p.shape, settings.exclude)]
    known = {id(matrix) for matrix in matrices}
    rest = [p for _, p in trained if id(p) not in known]
    if name in ("galore", "apollo", "fira"):
        decay = settings.weight_decay
        return new_projected(name, matrices, rest, weight_decay=decay, **settings.of_adam)
    make: Mapping[str, Callable[[list[Tensor], list[Tensor], Settings], Optimizer]] = {
        "adamw": partial(_new_adamw, scale=1.0),
        "split_adamw": partial(_new_adamw, scale=settings.matrix_scale),
        "muon": _new_muon,
        "adamw8bit": _new_adamw8bit,
    }
    return make[name](matrices, rest, settings)


def _new_adamw(
    matrices: list[Tensor], rest: list[Tensor], settings: Settings, scale: float
) -> Optimizer:
    groups = _groups(matrices, rest, settings.weight_decay)
    if matrices:
        groups[-1]["lr"] = settings.lr * scale
    return AdamW(groups, **settings.of_adam, fused=True)


def _new_adamw8bit(matrices: list[Tensor], rest: list[Tensor], settings: Settings) -> Optimizer:
    from torchao.optim import AdamW8bit

    class _AdamW8bit(PlainState, AdamW8bit):  # type: ignore[misc]
        pass

    return _AdamW8bit(_groups(matrices, rest, settings.weight_decay), **settings.of_adam)


def _new_muon(matrices: list[Tensor], rest: list[Tensor], settings: Settings) -> Optimizer:
    parts: list[Optimizer] = []
    if rest:
        parts.append(AdamW(rest, **settings.of_adam, weight_decay=0.0, fused=True))
    if matrices:
        decay = settings.weight_decay
        parts.append(
            Muon(matrices, settings.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    return Together(parts)


def _groups(
    matrices: list[Tensor], rest: list[Tensor], weight_decay: float
) -> list[dict[str, Any]]:
    """Group the rest, whose rate is the one that is shown, and then the matrices."""
    groups: list[dict[str, Any]] = [
        {"params": rest, "weight_decay": 0.0},
        {"params": matrices, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


class _Names(torch.nn.Module):
    """Adam-mini asks a model for names; a name of ours holds dots, which a module's may not."""

    def __init__(self, named: Named) -> None:
        super().__init__()
        self._named = named

    @override
    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from self._named  # type: ignore[misc]


def _new_adam_mini(trained: Named, settings: Settings) -> Optimizer:
    from pytorch_optimizer import AdamMini

    optimizer: Optimizer = AdamMini(
        _Names(trained),
        **settings.of_adam,
        weight_decay=settings.weight_decay,
        num_embeds=settings.hidden_size,
        num_heads=settings.num_heads,
    )
    for group in optimizer.param_groups:
        if not is_foldable(group["name"], group["params"][0].shape, settings.exclude):
            group["weight_decay"] = 0.0
    return optimizer


class Together(Optimizer):
    """Several optimizers that step, are scheduled and are saved as one.

    Args:
        parts: Each with parameters of its own.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of each.

        Args:
            closure: Evaluates the loss and its gradients anew.

        Returns:
            What the closure returns; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of all of them back.

        Args:
            state_dict: From `state_dict()`.
        """
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let the parts work on this one's groups and state, which loading replaces."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

"""The optimizers that FOAM is compared with, by name: settings, availability and creation."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from typing_extensions import override

from foam_lightning.errors import ConfigError
from foam_lightning.optim.groups import is_foldable
from foam_lightning.optim.plain_state import PlainState
from foam_lightning.settings import DEFAULT_EXCLUDE, OptimizerName

OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)
# The module that a baseline is imported from, and its name for pip.
_PACKAGES = {
    **dict.fromkeys(
        ("galore", "apollo", "fira", "adam_mini"), ("pytorch_optimizer", "pytorch-optimizer")
    ),
    "adamw8bit": ("torchao", "torchao"),
}


@dataclass(frozen=True, kw_only=True)
class BaselineSettings:
    """Hyperparameters of the baselines.

    Attributes:
        lr: Peak learning rate.
        betas: Decay of the two moments. On matrices, Muon uses its own momentum of 0.95 instead.
        eps: Added to the denominator; GaLore, APOLLO and Fira add it before bias correction.
        weight_decay: Decoupled decay of the matrices that FOAM would fold; all else has none.
        matrix_scale: Factor of lr for these matrices, in split_adamw.
        exclude: Regular expression on the names of matrices that FOAM would not fold.
        hidden_size: Width of the residual stream.
        num_heads: Query heads; Adam-mini has one second moment for each head.
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
    def adam_options(self) -> dict[str, Any]:
        """The options that all variants of Adam share."""
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps}


def installed_optimizers() -> list[str]:
    """List the optimizers whose packages are installed, FOAM first."""
    return [name for name in OPTIMIZERS if find_spec(_PACKAGES.get(name, ("torch",))[0])]


def package_version(name: str) -> str:
    """Return the package that an optimizer comes from, and its version."""
    package = _PACKAGES.get(name, ("torch", "torch"))[1]
    return f"{package} {version(package)}"


def check_installed(name: str) -> None:
    """Check that an optimizer exists and that its package is installed.

    Raises:
        ConfigError: The name is unknown, or the package is missing.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"there is no optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")
    if name not in installed_optimizers():
        package = _PACKAGES[name][1]
        raise ConfigError(
            f"the optimizer {name} needs {package}, which is not installed; pip install {package}, "
            "or pip install 'foam-lightning[baselines]' for all optimizers"
        )


def create_baseline(
    name: str, named_parameters: Iterable[tuple[str, Tensor]], settings: BaselineSettings
) -> Optimizer:
    """Create an optimizer other than FOAM. Its "matrices" are those that FOAM folds.

    - adamw: torch's, fused. Loshchilov and Hutter, arXiv:1711.05101.
    - split_adamw: the same with lr x matrix_scale on matrices, the control of every comparison.
    - galore, apollo, fira: pytorch-optimizer's, with rank a quarter of the smaller side of each
      matrix, a new projection every 200 steps and the scales of the papers. Zhao et al.,
      arXiv:2403.03507; Zhu et al., arXiv:2412.05270; Chen et al., arXiv:2410.01623. Departure of
      the library (4.1): APOLLO scales the projected gradient and projects it back, where the paper
      scales the gradient itself.
    - adam_mini: pytorch-optimizer's, with one second moment for each head of q and k and for every
      other matrix. Zhang et al., arXiv:2406.16793, whose later version has one for each row.
    - muon: torch's on matrices, with updates scaled to the RMS of AdamW's (match_rms_adamw) so that
      one learning rate suits both; AdamW on the others. Jordan et al. 2024; Liu et al.,
      arXiv:2502.16982.
    - adamw8bit: torchao's. Dettmers et al., arXiv:2110.02861.

    All resume exactly: checkpoints hold plain tensors, and APOLLO draws from seeds of its own.

    Args:
        name: One of `OPTIMIZERS`, except foam.
        named_parameters: As from `model.named_parameters()`; frozen ones are left out.
        settings: Hyperparameters.

    Raises:
        ConfigError: The name is unknown, or the package is missing.
    """
    check_installed(name)
    trained = [(key, tensor) for key, tensor in named_parameters if tensor.requires_grad]
    if name == "adam_mini":
        return _create_adam_mini(trained, settings)
    folds = {key: is_foldable(key, p.shape, settings.exclude) for key, p in trained}
    matrices = [p for key, p in trained if folds[key]]
    others = [p for key, p in trained if not folds[key]]
    decay, options = settings.weight_decay, settings.adam_options
    matrix_lr = settings.lr * (settings.matrix_scale if name == "split_adamw" else 1)
    # The others first: the learning rate that is logged is the one of the first group.
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": group_decay, "lr": lr}
        for params, group_decay, lr in ((others, 0.0, settings.lr), (matrices, decay, matrix_lr))
        if params
    ]
    if name in ("galore", "apollo", "fira"):
        from foam_lightning.optim.low_rank import create_low_rank

        return create_low_rank(name, matrices, others, weight_decay=decay, **options)
    if name == "muon":
        parts: list[Optimizer] = []
        if others:
            parts.append(AdamW(others, **options, weight_decay=0.0, fused=True))
        if matrices:
            parts.append(
                Muon(matrices, settings.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            )
        return CombinedOptimizer(parts)
    if name == "adamw8bit":
        from torchao.optim import AdamW8bit

        class _AdamW8bit(PlainState, AdamW8bit):  # type: ignore[misc]
            pass

        return _AdamW8bit(groups, **options)
    return AdamW(groups, **options, fused=True)


class _NamedParameters(torch.nn.Module):
    """The module that Adam-mini reads names from; real submodules cannot have dots in names."""

    def __init__(self, named: Sequence[tuple[str, Tensor]]) -> None:
        super().__init__()
        self._named = named

    @override
    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from self._named  # type: ignore[misc]


def _create_adam_mini(
    trained: Sequence[tuple[str, Tensor]], settings: BaselineSettings
) -> Optimizer:
    from pytorch_optimizer import AdamMini

    optimizer: Optimizer = AdamMini(
        _NamedParameters(trained),
        **settings.adam_options,
        weight_decay=settings.weight_decay,
        num_embeds=settings.hidden_size,
        num_heads=settings.num_heads,
    )
    for group in optimizer.param_groups:
        if not is_foldable(group["name"], group["params"][0].shape, settings.exclude):
            group["weight_decay"] = 0.0
    return optimizer


class CombinedOptimizer(Optimizer):
    """Several optimizers that step, are scheduled and are saved as one.

    Args:
        parts: Optimizers without common parameters.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step each part.

        Args:
            closure: Computes loss and gradients.

        Returns:
            The result of `closure`, or None without one.
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
        """Load the state of all parts.

        Args:
            state_dict: From `state_dict()`.
        """
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Make the parts use the groups and state of this optimizer, which loading replaces."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

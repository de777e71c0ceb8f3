"""FOAM for PyTorch Lightning: train LLaMA inside the memory you have.

The names below load on first use: `import foam_lightning` imports neither torch, nor lightning,
nor transformers, so that the command line can answer a typo at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foam_lightning.optim.foam import FOAM
    from foam_lightning.plan import FoldPlan
    from foam_lightning.units import ByteSize
    from tuner.planning.any_model import plan_for

__version__ = "0.1.0"
__all__ = ["FOAM", "ByteSize", "FoldPlan", "plan_for"]

_HOMES = {
    "FOAM": "foam_lightning.optim.foam",
    "FoldPlan": "foam_lightning.plan",
    "ByteSize": "foam_lightning.units",
    "plan_for": "tuner.planning.any_model",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

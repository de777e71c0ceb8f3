"""The layout of a run in TensorBoard: groups of curves, and pictures."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.tensorboard import SummaryWriter
from typing_extensions import override

from foam_lightning.callbacks.residual_energy import ResidualEnergy
from foam_lightning.callbacks.throughput import Throughput
from foam_lightning.module import LlamaFoam
from foam_lightning.storage.atomic import atomic_path

# TensorBoard reads files in the order of their names, so this one before those of the logger.
_FILE = "events.out.tfevents.0.board"

Layout = dict[str, dict[str, str]]
"""By group title and chart title, the regular expression that the beginning of its tags matches."""

_LOSS = "(train|validation)/loss$"
_RESIDUALS = "folding/residual_energy_"
_PEAKS = "memory/(measured|predicted|budget)_bytes$"


class TensorBoardLayout(Callback):
    """Write the charts of TensorBoard's tab "Custom Scalars", and the pictures of the plan.

    They are written once per run, however often it is resumed, to an event file of their own.

    Args:
        folder: The run folder.
        pictures: PNG files by title.
        throughput: Lists the tags of its curves.
    """

    def __init__(self, folder: Path, pictures: Mapping[str, Path], throughput: Throughput) -> None:
        self._folder = folder
        self._pictures = pictures
        self._throughput = throughput

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LlamaFoam)
        path = self._folder / _FILE
        if path.exists() or not trainer.is_global_zero:
            return
        groups = chart_layout(self._throughput.tags, folds=ResidualEnergy.applies_to(pl_module))
        _write(path, groups, self._pictures)


def chart_layout(throughput: Sequence[str], *, folds: bool) -> Layout:
    """Arrange the curves of a run in charts.

    TensorBoard merges the charts of several runs only if they are equal, so a chart does not depend
    on which roles fold in this run, or on whether it has a budget.

    Args:
        throughput: The tags of throughput; each gets its own chart.
        folds: Whether the run has curves of the residual; otherwise their group is left out.
    """
    speeds = {tag.removeprefix("throughput/").replace("_", " "): f"{tag}$" for tag in throughput}
    return {
        "loss": {"nats per token": _LOSS},
        **({"folding": {"share of the energy in the residual": _RESIDUALS}} if folds else {}),
        "memory": {"peak in bytes": _PEAKS},
        "throughput": speeds,
    }


def _write(path: Path, groups: Layout, pictures: Mapping[str, Path]) -> None:
    from matplotlib.image import imread

    charts = {
        group: {title: ["Multiline", [tags]] for title, tags in of_group.items()}
        for group, of_group in groups.items()
    }
    with TemporaryDirectory() as folder, atomic_path(path) as temporary:
        with SummaryWriter(folder) as writer:
            writer.add_custom_scalars(charts)
            for title, picture in pictures.items():
                pixels = torch.tensor(imread(picture))[..., :3]
                writer.add_image(title, pixels, dataformats="HWC")
        (file,) = Path(folder).iterdir()
        shutil.copyfile(file, temporary)

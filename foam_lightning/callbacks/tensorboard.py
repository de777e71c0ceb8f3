"""The page of a run in TensorBoard: its curves in groups, and its pictures."""

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

# TensorBoard reads the files of a folder in the order of their names: before those of the run.
_FILE = "events.out.tfevents.0.board"

Layout = dict[str, dict[str, str]]
"""The curves of every chart, by its title and by the title of its group: a regular expression that
matches the beginning of their tags, as TensorBoard takes it."""

_LOSS = "(train|validation)/loss$"
_RESIDUALS = "folding/residual_energy_"
_PEAKS = "memory/(measured|predicted|budget)_bytes$"


class TensorBoardLayout(Callback):
    """Lay the curves out for TensorBoard's tab "custom scalars", and add the pictures of the plan.

    It is written once in the life of a run, however often that is taken up, into an event file of
    its own, whole or not at all.

    Args:
        folder: Of the run.
        pictures: PNG files by title.
        throughput: Names its curves.
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
        groups = layout(self._throughput.tags, folds=ResidualEnergy.applies_to(pl_module))
        _write(path, groups, self._pictures)


def layout(throughput: Sequence[str], *, folds: bool) -> Layout:
    """Arrange the curves that a run gets.

    TensorBoard joins the charts of several runs only where they are equal, so a chart does not say
    which roles fold in this run, or whether it has a budget.

    Args:
        throughput: The tags of speed, each of which is a chart of its own.
        folds: Whether there are curves of the residual; else the group is left out.
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

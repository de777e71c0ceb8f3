"""Where the curves of a run go: TensorBoard, and other loggers of Lightning that are named."""

import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from lightning.pytorch.loggers import (
    CometLogger,
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)

from foam_lightning.errors import ConfigError
from foam_lightning.storage.atomic import write_text
from foam_lightning.storage.run_folder import RunFolder

LoggerName = Literal["tensorboard", "csv", "wandb", "mlflow", "comet"]
# The package to install, where it is not the name of the logger.
_PACKAGES = {"comet": "comet-ml"}
_BUILT_IN = ("tensorboard", "csv")


def check_loggers(loggers: Sequence[str | bool | Logger]) -> None:
    """Check loggers before anything is trained, without connecting to anything.

    Args:
        loggers: Names, or loggers of somebody's own.

    Raises:
        ConfigError: A package is missing, a logger writes to a URL, or none is wanted.
    """
    for logger in loggers:
        if logger is False:
            raise ConfigError(
                "trainer.logger false is not supported: the curves in TensorBoard are part of the "
                "run folder; leave it out"
            )
        if isinstance(logger, str) and logger not in _BUILT_IN:
            package = _PACKAGES.get(logger, logger)
            if find_spec(package.replace("-", "_")) is None:
                raise ConfigError(
                    f"trainer.logger {logger} needs a package that is not installed; pip install "
                    f"{package}"
                )
        if isinstance(logger, CSVLogger | TensorBoardLogger) and "://" in str(logger.root_dir):
            raise ConfigError(
                f"trainer.logger: {type(logger).__name__} writes to {logger.root_dir}; choose a "
                "local folder"
            )


def create_loggers(loggers: Sequence[str | bool | Logger], folder: RunFolder) -> list[Logger]:
    """Create the logger of TensorBoard, and those that are named.

    A name stands for Lightning's logger with its default arguments: its project, server and key
    are those of the package's environment variables or login.

    Args:
        loggers: Names, or loggers of somebody's own, which stay as they are.
        folder: Gets what they write. Its name and version name the run.
    """
    created: list[Logger] = [
        TensorBoardLogger(folder.path, name="", version="", default_hp_metric=False)
    ]
    for logger in loggers:
        if isinstance(logger, Logger):
            created.append(logger)
        elif isinstance(logger, str) and logger != "tensorboard":
            created.append(_create(logger, folder))
    return created


def _create(name: str, folder: RunFolder) -> Logger:
    root, run = str(folder.path), f"{folder.path.parent.name}-{folder.path.name}"
    if name == "csv":  # a version for each process, because it overwrites the file of the last one
        return CSVLogger(root, name="csv")
    if name == "wandb":
        return WandbLogger(name=run, save_dir=root, id=_identity(folder))
    if name == "comet":
        return CometLogger(
            name=run,
            offline_directory=root,
            experiment_key=_identity(folder),
            mode="get_or_create",
        )
    return MLFlowLogger(folder.path.parent.name, run_name=run, save_dir=f"{root}/mlruns")


def _identity(folder: RunFolder) -> str:
    """Return an identity on a server that stays when the run is resumed."""
    path = folder.path / ".logger_id"
    if not path.exists():
        write_text(path, secrets.token_hex(16))
    return path.read_text(encoding="utf-8") if path.exists() else ""

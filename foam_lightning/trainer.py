"""Lightning's Trainer, made for memory options and devices."""

from collections.abc import Mapping, Sequence
from typing import Any
from warnings import catch_warnings, filterwarnings

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import ModelParallelStrategy

from foam_lightning.checkpoint.io import add_atomic_io
from foam_lightning.distributed.ddp import SingleCopyDDP
from foam_lightning.distributed.topology import Devices, first_device
from foam_lightning.errors import ConfigError, first_line
from foam_lightning.plan import MemoryOptions
from foam_lightning.settings import TrainerSettings

_BARE = {
    # The end of the full run; a short run has its own number of steps.
    **dict.fromkeys(("max_epochs", "max_time", "min_steps", "min_epochs")),
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "profiler": None,
    "detect_anomaly": False,  # a plan that diverges is a result
}


def create_trainer(
    settings: TrainerSettings,
    memory_options: MemoryOptions,
    callbacks: Sequence[Callback],
    *,
    bare: bool = False,
    **overrides: Any,
) -> Trainer:
    """Create a trainer.

    Args:
        settings: Of the full run.
        memory_options: Have the number of accumulated micro-batches.
        callbacks: Come after those of the settings.
        bare: For short runs: without the callbacks and the end of the settings, logger, checkpoints
            and progress bar, and on one device, which accumulates the micro-batches of the others.
        overrides: Arguments of Lightning's Trainer that replace those of the settings.

    Raises:
        ConfigError: Lightning refuses an argument.
    """
    devices = Devices.from_trainer(settings.arguments)
    accumulated = memory_options.accumulate_grad_batches * (devices.count if bare else 1)
    arguments = {**settings.arguments}
    for name in ("limit_train_batches", "limit_val_batches"):
        _count_micro_batches(arguments, name, accumulated)
    arguments |= {**(_BARE if bare else {}), **overrides}
    _count_micro_batches(arguments, "val_check_interval", accumulated)
    arguments["callbacks"] = [*([] if bare else settings.callbacks), *callbacks]
    max_time = arguments.pop("max_time", None)
    arguments["accumulate_grad_batches"] = accumulated
    arguments["plugins"] = add_atomic_io(arguments.get("plugins"))
    if bare or devices.count == 1:
        arguments |= on_one_device(arguments)
    else:
        # The data module gives each device its rows.
        arguments |= {"use_distributed_sampler": False, "strategy": _strategy(devices)}
    try:
        if max_time is not None:  # first, so that the others see that it stops the run
            arguments["callbacks"].insert(0, Timer(max_time))
        with catch_warnings():
            filterwarnings("ignore", ".*AMP with fp16 is not supported on CPU")  # refused below
            trainer = Trainer(**arguments)
    except Exception as error:  # of an accelerator that is missing, or a callback given twice
        raise ConfigError(f"trainer: {first_line(error)}") from error
    if settings.scales_gradients and trainer.precision != settings.precision:
        raise ConfigError(
            "trainer.precision 16-mixed needs a GPU, and this machine has none; use bf16-mixed or "
            "32-true here"
        )
    return trainer


def _count_micro_batches(arguments: dict[str, Any], name: str, accumulated: int) -> None:
    """Turn a number of batches of `data.batch_size` rows into micro-batches, in place.

    Lightning counts micro-batches, but a memory budget chooses their size, and what is learned and
    evaluated must not depend on it.
    """
    if isinstance(arguments.get(name), int):
        arguments[name] *= accumulated


def on_one_device(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that restrict a trainer to the first of its devices."""
    devices = first_device(arguments.get("devices"))
    return {"devices": devices, "num_nodes": 1, "strategy": "auto"}


def _strategy(devices: Devices) -> ModelParallelStrategy | SingleCopyDDP:
    if not devices.shards:
        return SingleCopyDDP()
    return ModelParallelStrategy(
        data_parallel_size=devices.count,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,  # one file, for every tool and any number of devices
    )

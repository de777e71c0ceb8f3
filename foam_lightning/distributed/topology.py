"""The devices of a run: how many there are, and what each of them keeps."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from foam_lightning.errors import ConfigError

_STRATEGIES = ("auto", "ddp", "fsdp2")


@dataclass(frozen=True)
class Devices:
    """How many devices train one model, and whether they share it.

    Attributes:
        count: Devices over all machines, one process each.
        shards: Each keeps its share of weights, gradients and state, and gathers a layer when it
            needs it (FSDP2); else each keeps all of them (DDP). One device never shards.
    """

    count: int = 1
    shards: bool = False

    @classmethod
    def from_trainer(cls, trainer: Mapping[str, Any]) -> Self:
        """Read `devices`, `num_nodes` and `strategy` of Lightning's Trainer.

        A plan is made without the devices, so their number must be said: "auto" is one, whatever
        this machine has. Several devices with the strategy "auto" are "ddp", as in Lightning.

        Raises:
            ConfigError: The devices are not counted, or the strategy is not one that the account
                knows.
        """
        strategy = trainer.get("strategy") or "auto"
        if strategy not in _STRATEGIES:
            name = strategy if isinstance(strategy, str) else type(strategy).__name__
            raise ConfigError(
                f"trainer.strategy {name} is not supported; use {', '.join(_STRATEGIES)}"
            )
        count = _count(trainer.get("devices")) * int(trainer.get("num_nodes") or 1)
        return cls(count, shards=strategy == "fsdp2" and count > 1)

    def shard_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Give the shape of what the first device keeps of a parameter, from its whole shape.

        FSDP2 cuts rows (dimension 0) into as many chunks as there are devices, and pads those that
        get fewer: every device takes the memory of the first.
        """
        if not self.shards or not shape:
            return tuple(shape)
        return (-(-shape[0] // self.count), *shape[1:])


ONE_DEVICE = Devices()


def is_first_process() -> bool:
    """Tell whether this process prints and writes files for all, by what its launcher says of it.

    torchrun says RANK. Lightning, which starts the processes of a machine itself, says LOCAL_RANK
    and NODE_RANK. SLURM says SLURM_PROCID, but also where it manages nothing.
    """
    said = os.environ
    if "RANK" in said:
        return said["RANK"] == "0"
    if "LOCAL_RANK" in said:
        return said["LOCAL_RANK"] == said.get("NODE_RANK", "0") == "0"
    return said.get("SLURM_PROCID", "0") == "0"


def count_launched() -> int | None:
    """Count the processes that a launcher has started, this one among them; None without one.

    torchrun says WORLD_SIZE, and so does Lightning to the processes that it starts. srun says
    SLURM_NTASKS, which Lightning goes by as well, except in a job named "bash" or "interactive".
    """
    said = os.environ
    if "WORLD_SIZE" in said and ("RANK" in said or "LOCAL_RANK" in said):
        return int(said["WORLD_SIZE"])
    if "SLURM_NTASKS" in said and said.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(said["SLURM_NTASKS"])
    return None


def check_launched(command: str, devices: Devices) -> None:
    """Refuse processes that a launcher has started in another number than a command can use.

    Each of them would do the whole job, in one folder.

    Args:
        command: Of the command line; only `fit` is for several processes.
        devices: Those of the settings.

    Raises:
        ConfigError: There are too many, or too few.
    """
    count = count_launched()
    if count is None:
        return
    if count > 1 and command != "fit":
        raise ConfigError(
            f"{command} is for one process and was started in {count}; type it without torchrun "
            "or srun"
        )
    if command == "fit" and count != devices.count:
        raise ConfigError(
            f"processes started: {count}; trainer.devices x trainer.num_nodes: {devices.count}; "
            "set trainer.devices to the processes of one machine, trainer.num_nodes to the machines"
        )


def first_device(devices: Any) -> int | list[int]:
    """Choose one of Lightning's `devices`: the first where they are named, else any."""
    named = _named(devices)
    return named[:1] if named else 1


def device_of(rank: int, devices: Any) -> int:
    """Tell which of Lightning's `devices` a rank of this machine has."""
    named = _named(devices)
    return named[rank] if rank < len(named) else rank


def _named(devices: Any) -> list[int]:
    """List the devices of a list or of a text such as "0,2"; none where there is but a number."""
    if isinstance(devices, str) and "," in devices:
        devices = [name for name in devices.split(",") if name.strip()]
    return [int(name) for name in devices] if isinstance(devices, list | tuple) else []


def _count(devices: Any) -> int:
    if devices in (None, "auto"):
        return 1
    try:
        count = len(_named(devices)) or int(devices)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise ConfigError(
            f"trainer.devices {devices} does not say how many; give a number, or a list of devices"
        )
    return count

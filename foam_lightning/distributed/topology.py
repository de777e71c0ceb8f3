"""The devices of a run: their number, their shards, and the processes that a launcher started."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from foam_lightning.errors import ConfigError

_STRATEGIES = ("auto", "ddp", "fsdp2")


@dataclass(frozen=True)
class Devices:
    """How many devices train one model, and whether the model is sharded over them.

    Attributes:
        count: Devices on all machines, one process each.
        shards: Each keeps a shard of weights, gradients and optimizer state (FSDP2) instead of all
            (DDP). False for one device.
    """

    count: int = 1
    shards: bool = False

    @classmethod
    def from_trainer(cls, trainer: Mapping[str, Any]) -> Self:
        """Read `devices`, `num_nodes` and `strategy` of Lightning's Trainer.

        A plan is made without the devices, so their number must be given: "auto" is one,
        whatever this machine has. Several devices with the strategy "auto" use DDP, like Lightning.

        Raises:
            ConfigError: The number of devices is unknown, or the strategy is not supported.
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
        """Return the shape of the first device's shard of a parameter, from its whole shape.

        FSDP2 splits rows (dimension 0) over the devices and pads smaller shards, so every device
        takes the memory of the first.
        """
        if not self.shards or not shape:
            return tuple(shape)
        return (-(-shape[0] // self.count), *shape[1:])


ONE_DEVICE = Devices()


def is_first_process() -> bool:
    """Return whether this process is rank 0, which prints and writes files for all.

    torchrun sets RANK. Lightning, which starts the processes of a machine itself, sets LOCAL_RANK
    and NODE_RANK. SLURM sets SLURM_PROCID, even in jobs whose processes it does not start.
    """
    env = os.environ
    if "RANK" in env:
        return env["RANK"] == "0"
    if "LOCAL_RANK" in env:
        return env["LOCAL_RANK"] == env.get("NODE_RANK", "0") == "0"
    return env.get("SLURM_PROCID", "0") == "0"


def count_launched() -> int | None:
    """Return how many processes the launcher started, including this one; None without a launcher.

    torchrun and Lightning set WORLD_SIZE. srun sets SLURM_NTASKS, which Lightning uses as well,
    except in a job named "bash" or "interactive".
    """
    env = os.environ
    if "WORLD_SIZE" in env and ("RANK" in env or "LOCAL_RANK" in env):
        return int(env["WORLD_SIZE"])
    if "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(env["SLURM_NTASKS"])
    return None


def check_launched(command: str, devices: Devices) -> None:
    """Check that a launcher started as many processes as a command uses.

    Otherwise each of them would do the whole job, in one folder.

    Args:
        command: The command; only `fit` uses several processes.
        devices: The devices of the settings.

    Raises:
        ConfigError: There are too many or too few processes.
    """
    count = count_launched()
    if count is None:
        return
    if count > 1 and command != "fit":
        raise ConfigError(
            f"{command} uses one process, but {count} were started; run it without torchrun or srun"
        )
    if command == "fit" and count != devices.count:
        raise ConfigError(
            f"{count} processes were started, but trainer.devices x trainer.num_nodes is "
            f"{devices.count}; set trainer.devices to the number of processes per machine and "
            "trainer.num_nodes to the number of machines"
        )


def first_device(devices: Any) -> int | list[int]:
    """Select one device for Lightning: the first of a list, otherwise any."""
    named = _named(devices)
    return named[:1] if named else 1


def device_of(rank: int, devices: Any) -> int:
    """Return which of Lightning's `devices` a rank of this machine uses."""
    named = _named(devices)
    return named[rank] if rank < len(named) else rank


def _named(devices: Any) -> list[int]:
    """List the devices in a list or a string such as "0,2"; empty for a plain number."""
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
            f"trainer.devices must be a number above 0 or a list of devices, got {devices}"
        )
    return count

"""A training job: the settings from which fresh models, data and trainers are made."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from foam_lightning.checkpoint.io import add_atomic_io
from foam_lightning.data.module import TextData
from foam_lightning.distributed.ddp import SingleCopyDDP
from foam_lightning.distributed.topology import Devices, device_of, first_device
from foam_lightning.errors import ConfigError, first_line
from foam_lightning.memory.account import Accountant
from foam_lightning.memory.device import Gpu, find_gpu, load_costs
from foam_lightning.memory.trace import weight_dtype
from foam_lightning.model.pretrained import check_weights
from foam_lightning.module import LlamaFoam
from foam_lightning.optim.baselines import check_installed
from foam_lightning.plan import FoldPlan, MemoryOptions
from foam_lightning.settings import DataSettings, ModelSettings, Precision, TrainerSettings
from foam_lightning.validation import SEED, check_ranges

_BARE = {
    "callbacks": None,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train, on what, and how; every run of a job starts from fresh objects.

    Args:
        model: Of the model and the optimizer.
        data: Of the text and its batches.
        trainer: Of Lightning's `Trainer`.
        seed: Seeds weights and order of the data.
        architecture: Stands for the folder `model.pretrained` where that is gone, and a checkpoint
            has the weights; see `LlamaFoam`.
    """

    model: ModelSettings
    data: DataSettings
    trainer: TrainerSettings
    seed: int
    architecture: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse what the account could not stand for.

        Raises:
            ConfigError: A setting is unknown to the account, or is decided elsewhere.
        """
        weight_dtype(self.precision)
        _ = self.devices
        check_ranges("", {"seed_everything": self.seed}, {"seed_everything": SEED})

    @property
    def optimizer(self) -> str:
        """The name of what trains."""
        return self.model.optimizer

    @property
    def is_foam(self) -> bool:
        """Whether FOAM trains; levels, budgets and the account are its own."""
        return self.optimizer == "foam"

    @property
    def precision(self) -> Precision:
        """Lightning's name of the precision."""
        return self.trainer.precision

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the full run."""
        return self.trainer.max_steps

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.data.batch_size

    @property
    def on_gpu(self) -> bool:
        """Whether the plan is for a GPU: it is, with or without one here, unless it says CPU."""
        return self.trainer.is_on_gpu

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that this process trains on; None where the job is not for one, or none is here.

        It is that of the rank, among those that the settings name or else among all.
        """
        rank = int(os.environ.get("LOCAL_RANK", 0))
        return find_gpu(wanted=self.on_gpu, index=device_of(rank, self.trainer.devices))

    @cached_property
    def devices(self) -> Devices:
        """The devices of the full run.

        Raises:
            ConfigError: They are not counted, or the strategy is unknown.
        """
        return Devices.from_trainer(self.trainer.arguments)

    @cached_property
    def memory_options(self) -> MemoryOptions:
        """The memory options that the settings ask for.

        Raises:
            ConfigError: The settings contradict each other.
        """
        self._check_optimizer()
        num_devices = self.devices.count
        releases = self.model.gradient_release
        self._check_release(releases)
        micro = self.data.micro_batch_size or max(1, self.batch_size // num_devices)
        if self.batch_size % (micro * num_devices):
            over = f" x trainer.devices {num_devices}" if num_devices > 1 else ""
            raise ConfigError(
                f"data.micro_batch_size {micro}{over} must divide data.batch_size {self.batch_size}"
            )
        if releases and micro != self.batch_size:
            raise ConfigError(
                f"model.gradient_release cannot accumulate micro-batches of {micro} to "
                f"data.batch_size {self.batch_size}; make both equal, or leave "
                "data.micro_batch_size out"
            )
        memory_options = MemoryOptions(
            micro_batch_size=micro,
            accumulate_grad_batches=self.batch_size // (micro * num_devices),
            gradient_release=releases,
            state_dtype=self.model.state_dtype,
            state_offload=self.model.state_offload,
        )
        self.check(memory_options)
        return memory_options

    def check(self, memory_options: MemoryOptions) -> None:
        """Refuse memory options that the settings contradict.

        Raises:
            ConfigError: Gradients would be released that the trainer is to clip or several devices
                are to average, or state would be offloaded from the CPU; or a baseline trains,
                which has neither.
        """
        if not self.is_foam:
            self._check_options_of_baseline(memory_options)
        self._check_release(memory_options.gradient_release)
        clip_val = self.trainer.gradient_clip_val
        if memory_options.gradient_release and clip_val:
            raise ConfigError(
                f"trainer.gradient_clip_val {clip_val} needs all gradients at once, and gradient "
                "release keeps none; set model.clip_norm instead, which clips each by itself"
            )
        if memory_options.state_offload and not self.on_gpu:
            raise ConfigError(
                "model.state_offload needs a GPU, and trainer.accelerator is cpu: there it is in "
                "host memory anyway; leave it out"
            )

    def spread(self, plan: FoldPlan, *, num_devices: int | None = None) -> FoldPlan:
        """Make a plan for other devices one for these: the same batch, in micro-batches no larger.

        Args:
            plan: The plan.
            num_devices: How many it is for; by default these, or one where that is the batch.

        Raises:
            ConfigError: The devices do not divide the batch, or the plan is for another one.
        """
        count, memory_options = self.devices.count, plan.memory_options
        num_devices = num_devices or (
            count if memory_options.batch_size * count == self.batch_size else 1
        )
        if num_devices == count and memory_options.batch_size * count == self.batch_size:
            return plan
        rows, rest = divmod(memory_options.batch_size * num_devices, count)
        if memory_options.batch_size * num_devices != self.batch_size or rest:
            on = "one device" if num_devices == 1 else f"each of {num_devices} devices"
            raise ConfigError(
                f"the plan takes {memory_options.batch_size} rows a step on {on}, of which {count} "
                f"cannot make data.batch_size {self.batch_size}; make a plan for both"
            )
        micro = next(n for n in range(memory_options.micro_batch_size, 0, -1) if rows % n == 0)
        spread = replace(
            memory_options, micro_batch_size=micro, accumulate_grad_batches=rows // micro
        )
        return replace(plan, memory_options=spread)

    def check_weights(self) -> None:
        """Refuse a pretrained folder whose weights are not those of its model, without reading any.

        Raises:
            CheckpointError: They are missing, damaged, or do not fit.
        """
        if self.model.pretrained is not None and self.architecture is None:
            check_weights(self.model.pretrained)

    def new_module(self, *, seed: int | None = None) -> LlamaFoam:
        """Make the module; weights come with `configure_model`.

        Args:
            seed: Seeds the initial weights; the job's own by default.
        """
        return LlamaFoam(
            self.model,
            seed=self.seed if seed is None else seed,
            architecture=self.architecture,
        )

    def new_data(self, memory_options: MemoryOptions, *, seed: int | None = None) -> TextData:
        """Make the data module for these memory options.

        Args:
            memory_options: Give the micro-batch.
            seed: Seeds the order of the training rows; the job's own by default.
        """
        settings = replace(
            self._data_with_tokenizer, micro_batch_size=memory_options.micro_batch_size
        )
        return TextData(settings, seed=self.seed if seed is None else seed)

    @cached_property
    def _data_with_tokenizer(self) -> DataSettings:
        """The data settings, with the tokenizer of a pretrained model unless they name another."""
        if self.model.pretrained is None:
            return self.data
        return replace(
            self.data,
            tokenizer=self.data.tokenizer or self.model.pretrained,
            vocab_size=self.new_module().llama_config().vocab_size,
        )

    def new_trainer(
        self,
        memory_options: MemoryOptions,
        callbacks: Sequence[Callback],
        *,
        bare: bool = False,
        **settings: Any,
    ) -> Trainer:
        """Make the trainer for these memory options.

        Args:
            memory_options: Give the accumulation.
            callbacks: All callbacks of this run, besides those of the settings.
            bare: Nothing but `callbacks`: no logger, checkpoints, progress bar or callbacks of the
                settings, and one device, which then accumulates what the others would do. For short
                runs.
            settings: Take the place of the job's own.

        Raises:
            ConfigError: Lightning refuses a setting.
        """
        merged = {**self.trainer.arguments, **(_BARE if bare else {}), **settings}
        accumulated = memory_options.accumulate_grad_batches * (self.devices.count if bare else 1)
        interval = merged.get("val_check_interval")
        if isinstance(interval, int):
            # Lightning counts batches here; a user who sets steps does not know the micro-batch.
            merged["val_check_interval"] = interval * accumulated
        merged["callbacks"] = [*(merged.get("callbacks") or []), *callbacks]
        merged["accumulate_grad_batches"] = accumulated
        merged["plugins"] = add_atomic_io(merged.get("plugins"))
        try:
            return Trainer(**merged | (_alone(merged) if bare else self._together()))
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise ConfigError(f"trainer: {first_line(error)}") from error

    def new_accountant(self) -> Accountant:
        """Make the accountant of this job's model."""
        module = self.new_module()
        return Accountant(
            module,
            num_layers=module.llama_config().num_hidden_layers,
            sequence_length=self.data.sequence_length,
            precision=self.precision,
            on_gpu=self.on_gpu,
            devices=self.devices,
            costs=load_costs(self.gpu),
        )

    def on_one_device(self) -> Self:
        """Make the same job for one device, which accumulates what the others would have done."""
        return replace(self, trainer=self.trainer.replace(**_alone(self.trainer.arguments)))

    def plan_at(self, level: int) -> FoldPlan:
        """Make the plan with every matrix at one level and the settings' memory options."""
        return self.new_module().uniform_plan(level, self.memory_options)

    def own_plan(self) -> FoldPlan:
        """Make the plan of the settings alone: their level under FOAM, level 0 under a baseline."""
        return self.plan_at(self.model.level if self.is_foam else 0)

    def _check_optimizer(self) -> None:
        check_installed(self.optimizer)
        if self.devices.shards and not self.is_foam:
            raise ConfigError(
                f"model.optimizer {self.optimizer} does not know shares of a matrix, and "
                "trainer.strategy fsdp2 makes them; take ddp, or model.optimizer foam"
            )

    def _check_options_of_baseline(self, memory_options: MemoryOptions) -> None:
        own = memory_options.state_dtype == self.model.state_dtype
        if memory_options.gradient_release or memory_options.state_offload or not own:
            raise ConfigError(
                f"model.optimizer {self.optimizer} cannot release gradients, nor keep its state in "
                f"{memory_options.state_dtype} or in host memory: those memory options are FOAM's"
            )

    def _check_release(self, releases: bool) -> None:
        count = self.devices.count
        if releases and count > 1:
            raise ConfigError(
                f"gradient release needs one device, got {count}: what is to be averaged cannot be "
                "spent at once; unset model.gradient_release, or make a plan for "
                f"trainer.devices {count}"
            )

    def _together(self) -> dict[str, Any]:
        """Say to Lightning how the devices work together; the data module gives each its rows."""
        if self.devices.count == 1:
            return _alone(self.trainer.arguments)
        if self.devices.shards:
            return {
                "use_distributed_sampler": False,
                "strategy": ModelParallelStrategy(
                    data_parallel_size=self.devices.count,
                    tensor_parallel_size=1,
                    # One file, for every tool and any number of devices.
                    save_distributed_checkpoint=False,
                ),
            }
        return {"use_distributed_sampler": False, "strategy": SingleCopyDDP()}


def _alone(trainer: Mapping[str, Any]) -> dict[str, Any]:
    devices = first_device(trainer.get("devices"))
    return {"devices": devices, "num_nodes": 1, "strategy": "auto"}

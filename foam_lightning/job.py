"""A training job: the settings, and the model, data and trainer that are created from them."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import psutil
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers.logger import DummyLogger

from foam_lightning.callbacks.given import check_callbacks
from foam_lightning.data.module import TextData
from foam_lightning.data.notices import print_once
from foam_lightning.data.own import OwnData
from foam_lightning.data.tokenizer import count_other_ids, load_tokenizer
from foam_lightning.distributed.topology import Devices, device_of
from foam_lightning.errors import ConfigError, DataError
from foam_lightning.loggers import check_loggers
from foam_lightning.memory.account import Accountant
from foam_lightning.memory.device import Gpu, calibrate, find_gpu, load_costs
from foam_lightning.memory.trace import weight_dtype
from foam_lightning.model.pretrained import check_weights
from foam_lightning.module import LlamaFoam
from foam_lightning.optim.baselines import check_installed
from foam_lightning.plan import FoldPlan, MemoryOptions, WeightsDtype
from foam_lightning.settings import DataSettings, ModelSettings, TrainerSettings
from foam_lightning.trainer import create_trainer, on_one_device
from foam_lightning.units import at_least, format_bytes
from foam_lightning.validation import SEED, check_ranges


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train, on what data, and how. Each run of a job starts from new objects.

    Args:
        model: Settings of the model and its optimizer.
        data: Settings of the text and its batches.
        trainer: Settings of Lightning's Trainer.
        seed: Seeds the weights and the order of the data.
        architecture: Replaces the folder `model.pretrained`, if that is gone and a checkpoint has
            the weights; see `LlamaFoam`.

    Raises:
        ConfigError: The seed is out of range, or precision, devices or strategy are not supported.
    """

    model: ModelSettings
    data: DataSettings
    trainer: TrainerSettings
    seed: int
    architecture: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        weight_dtype(self.trainer.precision)
        _ = self.devices  # raises an error if they are not supported
        self._check_scaler()
        check_ranges("", {"seed_everything": self.seed}, {"seed_everything": SEED})

    @property
    def is_foam(self) -> bool:
        """Whether FOAM trains; fold levels, budgets and the memory account need it."""
        return self.model.optimizer == "foam"

    @property
    def gpu(self) -> Gpu | None:
        """The GPU of this process; None if the job is not for a GPU, or this machine has none."""
        rank = int(os.environ.get("LOCAL_RANK", 0))
        index = device_of(rank, self.trainer.devices)
        return find_gpu(wanted=self.trainer.is_on_gpu, index=index)

    @cached_property
    def devices(self) -> Devices:
        """The devices of the full run.

        Raises:
            ConfigError: Their number is not given, or the strategy is not supported.
        """
        return Devices.from_trainer(self.trainer.arguments)

    @cached_property
    def memory_options(self) -> MemoryOptions:
        """The memory options of the settings, or those that a budget starts from.

        A run may need more of them: int8 weights need gradient release, which a budget turns on.

        Raises:
            ConfigError: The settings contradict each other.
        """
        self._check_optimizer()
        num_devices, batch_size = self.devices.count, self.data.batch_size
        sums = self.model.grad_offload
        releases = self.model.gradient_release or sums
        self._check_one_device(releases, self.model.weights_dtype)
        micro = self.data.micro_batch_size or max(1, batch_size // num_devices)
        if batch_size % (micro * num_devices):
            over = f" x trainer.devices {num_devices}" if num_devices > 1 else ""
            raise ConfigError(
                f"data.micro_batch_size {micro}{over} must divide data.batch_size {batch_size}"
            )
        if releases and not sums and micro != batch_size:
            raise ConfigError(
                f"model.gradient_release needs a step of one micro-batch, got micro-batches of "
                f"{micro} for data.batch_size {batch_size}; make both equal, or set "
                "model.grad_offload"
            )
        memory_options = MemoryOptions(
            micro_batch_size=micro,
            accumulate_grad_batches=batch_size // (micro * num_devices),
            gradient_release=releases,
            grad_offload=sums,
            state_dtype=self.model.state_dtype,
            state_offload=self.model.state_offload,
            weights_dtype=self.model.weights_dtype,
        )
        self._check_settings(memory_options)
        return memory_options

    def check_memory_options(self, memory_options: MemoryOptions) -> None:
        """Refuse memory options that contradict the settings or each other.

        Raises:
            ConfigError: Gradient release or int8 weights on several devices; gradient release with
                gradient clipping over all parameters or with a gradient scaler; int8 weights
                without gradient release; offloaded state or gradients on a CPU; or a baseline with
                options of FOAM.
        """
        self._check_settings(memory_options)
        if memory_options.weights_dtype == "int8" and not memory_options.gradient_release:
            raise ConfigError(
                "model.weights_dtype int8 needs model.gradient_release, since the gradients of all "
                "matrices at once take twice the bytes of the weights; set "
                "model.gradient_release true, or pass --memory-budget, which turns it on"
            )

    def _check_settings(self, memory_options: MemoryOptions) -> None:
        if not self.is_foam:
            self._check_options_of_baseline(memory_options)
        self._check_one_device(memory_options.gradient_release, memory_options.weights_dtype)
        clip_val = self.trainer.gradient_clip_val
        if memory_options.updates_in_backward and clip_val:
            raise ConfigError(
                f"trainer.gradient_clip_val {clip_val} needs all gradients at once, and gradient "
                "release frees each one; set model.clip_norm instead, which clips each by itself, "
                "or on a GPU model.grad_offload, which keeps their sums in host memory"
            )
        if memory_options.gradient_release and self.trainer.scales_gradients:
            raise ConfigError(
                "trainer.precision 16-mixed scales the loss, and gradient release would use each "
                "gradient before it is scaled back; unset model.gradient_release, or set "
                "trainer.precision bf16-mixed"
            )
        for option in ("state_offload", "grad_offload"):
            if getattr(memory_options, option) and not self.trainer.is_on_gpu:
                raise ConfigError(
                    f"model.{option} needs a GPU, and trainer.accelerator is cpu, where everything "
                    "is in host memory anyway; remove it"
                )

    def check_host_memory(self, host_bytes: int) -> None:
        """Refuse a run for whose state and gradients this machine has not enough memory free.

        Without the GPU of the job, this is not the machine of the run, and nothing is checked.

        Args:
            host_bytes: What the run keeps in pinned host memory.

        Raises:
            ConfigError: Less than that is free.
        """
        free = psutil.virtual_memory().available
        if host_bytes > free and self.gpu is not None:
            raise ConfigError(
                f"state and gradients in host memory need {at_least(host_bytes)}, and this machine "
                f"has {format_bytes(free)} free; end other programs, raise --memory-budget or "
                "lower data.batch_size, so that less is kept there"
            )

    def adapt_plan(self, plan: FoldPlan, *, num_devices: int | None = None) -> FoldPlan:
        """Adapt a plan for another number of devices: the same batch, in micro-batches no larger.

        Args:
            plan: The plan.
            num_devices: The number of devices it was made for; by default that of the job, or one
                if the plan has the whole batch on one device.

        Raises:
            ConfigError: The devices do not divide the batch, or the plan has another batch size.
        """
        count, options, batch_size = self.devices.count, plan.memory_options, self.data.batch_size
        num_devices = num_devices or (count if options.batch_size * count == batch_size else 1)
        if num_devices == count and options.batch_size * count == batch_size:
            return plan
        rows, rest = divmod(options.batch_size * num_devices, count)
        if options.batch_size * num_devices != batch_size or rest:
            on = "one device" if num_devices == 1 else f"each of {num_devices} devices"
            raise ConfigError(
                f"the plan has {options.batch_size} rows per step on {on}; {count} devices cannot "
                f"make data.batch_size {batch_size} of them; make a plan for these devices"
            )
        micro = next(n for n in range(options.micro_batch_size, 0, -1) if rows % n == 0)
        adapted = replace(options, micro_batch_size=micro, accumulate_grad_batches=rows // micro)
        return replace(plan, memory_options=adapted)

    def with_steps(self) -> Self:
        """Return the same job with its length in steps, as `trainer.max_steps`.

        It follows from the data where `trainer.max_epochs` ends the run first. A share of an epoch
        in `trainer.limit_train_batches` becomes a number of steps, which does not depend on the
        size of a micro-batch.

        Raises:
            ConfigError: A stream has no epochs, or the share is less than one step.
            DataError: The data cannot be read.
        """
        trainer, limit = self.trainer, self.trainer.epoch_limit
        is_share = isinstance(limit, float) and limit != 1
        if trainer.max_epochs is None and not is_share:
            return self
        steps = self.new_data(self.memory_options).steps_per_epoch()
        if steps is None:
            if trainer.max_steps < 1 or is_share:
                raise ConfigError("a stream has no end; set trainer.max_steps, and no part of it")
            return self
        used = int(steps * limit) if isinstance(limit, float) else min(steps, limit)
        if not used:
            raise ConfigError(
                f"trainer.limit_train_batches {limit:g} of the {steps} steps of an epoch is less "
                f"than one; use {1 / steps:.2g} or more, or a number of steps"
            )
        arguments: dict[str, Any] = {"max_epochs": None}
        if is_share:
            arguments["limit_train_batches"] = used
        if trainer.max_epochs is not None:
            most = trainer.max_steps if trainer.max_steps > 0 else math.inf
            arguments["max_steps"] = int(min(trainer.max_epochs * used, most))
        return replace(self, trainer=trainer.replace(**arguments))

    def with_one_device(self) -> Self:
        """Return the same job on one device."""
        arguments = on_one_device(self.trainer.arguments)
        return replace(self, trainer=self.trainer.replace(**arguments))

    def uniform_plan(self, level: int) -> FoldPlan:
        """Return the plan with one fold level for all matrices and the settings' options.

        Raises:
            ConfigError: The settings contradict each other.
        """
        self.check_memory_options(self.memory_options)
        return self.new_module().uniform_plan(level, self.memory_options)

    def configured_plan(self) -> FoldPlan:
        """Return the plan of the settings: model.level for FOAM, level 0 for a baseline."""
        return self.uniform_plan(self.model.level if self.is_foam else 0)

    def check_weights(self) -> None:
        """Check the weights of `model.pretrained`, if any, against its sizes, without reading them.

        Raises:
            CheckpointError: Weights are missing, damaged, or of another shape.
        """
        if self.model.pretrained is not None and self.architecture is None:
            check_weights(self.model.pretrained)

    def check_tokenizer(self) -> None:
        """Print a warning if `data.tokenizer` has other ids than the tokenizer of the model.

        Raises:
            DataError: `data.tokenizer` cannot be loaded.
        """
        named, pretrained = self.data.tokenizer, self.model.pretrained
        if named is None or pretrained is None or self.architecture is not None:
            return
        try:
            own = load_tokenizer(pretrained)
        except DataError:  # a folder without one, which is why another is named
            return
        if num_other := count_other_ids(own, load_tokenizer(named)):
            print_once(
                f"warning: data.tokenizer {named} gives {num_other} of the {len(own)} tokens of "
                f"model.pretrained {pretrained} another id or none; the embeddings of these start "
                "as those of other tokens"
            )

    def new_module(self, *, seed: int | None = None) -> LlamaFoam:
        """Create the module; its weights are created in `configure_model`.

        Args:
            seed: Seeds the initial weights; by default that of the job.
        """
        return LlamaFoam(
            self.model,
            seed=self.seed if seed is None else seed,
            architecture=self.architecture,
        )

    def new_data(
        self, memory_options: MemoryOptions, *, seed: int | None = None
    ) -> TextData | OwnData:
        """Create the data module.

        Args:
            memory_options: Have the size of a micro-batch.
            seed: Seeds the order of the training rows; by default that of the job.
        """
        settings = replace(
            self._data_with_tokenizer, micro_batch_size=memory_options.micro_batch_size
        )
        kind = TextData if settings.class_path is None else OwnData
        return kind(settings, seed=self.seed if seed is None else seed)

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
        self, memory_options: MemoryOptions, callbacks: Sequence[Callback], **options: Any
    ) -> Trainer:
        """Create a trainer; arguments as for `create_trainer`."""
        return create_trainer(self.trainer, memory_options, callbacks, **options)

    def calibrate_gpu(self) -> None:
        """Measure what the GPU of this process needs beyond tensors, unless that is known.

        Raises:
            ConfigError: Lightning refuses an argument of the trainer.
        """
        if (gpu := self.gpu) is None:
            return
        # Under `trainer.deterministic` Lightning sets CUBLAS_WORKSPACE_CONFIG, which torch reads
        # once, at the first matrix product.
        self.new_trainer(self.memory_options, [], bare=True)
        calibrate(gpu)

    def check_trainer(self) -> None:
        """Create a trainer once, and try callbacks and loggers, before anything is trained.

        Raises:
            ConfigError: Lightning refuses an argument, or a callback or logger cannot work.
        """
        interval = self.trainer.arguments.get("val_check_interval")
        if self.data.streaming and isinstance(interval, float) and interval != 1:
            raise ConfigError(
                f"trainer.val_check_interval {interval} needs the length of an epoch, which "
                "data.streaming does not know; give a number of optimizer steps, such as 100"
            )
        if self.trainer.arguments.get("max_time") and any(
            isinstance(callback, Timer) for callback in self.trainer.callbacks
        ):
            raise ConfigError(
                "trainer.max_time and the callback Timer both limit the time; leave one of them out"
            )
        check_loggers(self.trainer.loggers)
        trainer = self.new_trainer(self.memory_options, [], logger=DummyLogger())
        check_callbacks(self.trainer.callbacks, trainer, self.new_module())

    def new_accountant(self) -> Accountant:
        """Create the accountant, which predicts the memory of this job."""
        module = self.new_module()
        return Accountant(
            module,
            num_layers=module.llama_config().num_hidden_layers,
            sequence_length=self.data.sequence_length,
            precision=self.trainer.precision,
            on_gpu=self.trainer.is_on_gpu,
            devices=self.devices,
            costs=load_costs(self.gpu),
        )

    def _check_scaler(self) -> None:
        if not self.trainer.scales_gradients:
            return
        if not self.trainer.is_on_gpu:
            raise ConfigError(
                "trainer.precision 16-mixed needs a GPU, and trainer.accelerator is cpu; use "
                "bf16-mixed or 32-true there"
            )
        if self.devices.shards:
            raise ConfigError(
                "trainer.strategy fsdp2 does not support trainer.precision 16-mixed; use ddp, or "
                "trainer.precision bf16-mixed"
            )

    def _check_optimizer(self) -> None:
        check_installed(self.model.optimizer)
        if self.devices.shards and not self.is_foam:
            raise ConfigError(
                f"model.optimizer {self.model.optimizer} needs whole matrices, and "
                "trainer.strategy fsdp2 shards them; use ddp, or model.optimizer foam"
            )

    def _check_options_of_baseline(self, options: MemoryOptions) -> None:
        has_own_dtype = options.state_dtype == self.model.state_dtype
        foam_only = options.gradient_release or options.state_offload or options.weights_dtype
        if foam_only or not has_own_dtype:
            raise ConfigError(
                f"model.optimizer {self.model.optimizer} does not support gradient release, "
                f"offloaded state, int8 weights or {options.state_dtype} state of a plan; use foam"
            )

    def _check_one_device(self, is_released: bool, weights_dtype: WeightsDtype | None) -> None:
        count = self.devices.count
        if weights_dtype is not None and count > 1:
            raise ConfigError(
                f"model.weights_dtype {weights_dtype} needs one device, got {count}: no strategy "
                "here shards or averages weights in int8; unset it, or set trainer.devices 1"
            )
        if is_released and count > 1:
            raise ConfigError(
                f"gradient release needs one device, got {count}, whose gradients must be averaged "
                "first; unset model.gradient_release and model.grad_offload, or make a plan for "
                f"trainer.devices {count}"
            )

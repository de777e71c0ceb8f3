"""LLaMA trained with FOAM, as a LightningModule."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from foam_lightning.distributed.fsdp import shard
from foam_lightning.errors import CheckpointError, ConfigError
from foam_lightning.model import llama, rope
from foam_lightning.model.activation_checkpointing import checkpoint_layers
from foam_lightning.model.int8_weights import use_int8_weights
from foam_lightning.model.loss import StepMean, token_loss
from foam_lightning.model.pretrained import architecture_to_json, create_model, model_config
from foam_lightning.optim.factory import create_optimizer
from foam_lightning.optim.gradient_offload import HostGradients
from foam_lightning.optim.gradient_release import BackwardGuard, release_gradients
from foam_lightning.optim.groups import is_foldable
from foam_lightning.optim.schedule import learning_rate_factor
from foam_lightning.plan import FoldPlan, MemoryOptions
from foam_lightning.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

Batch = Mapping[str, Tensor]
_NO_PLAN = "no fold plan is set; call set_plan(plan) before training"


class LlamaFoam(LightningModule):
    """A LLaMA and its optimizer, trained by a fold plan.

    Args:
        settings: Settings of the model and the optimizer.
        seed: Seeds the initial weights.
        architecture: What a checkpoint saved of the folder `settings.pretrained`, so that the model
            can be built without that folder.
        arguments: Arguments of `ModelSettings`, instead of `settings`, as a checkpoint has them.

    Raises:
        ConfigError: A setting is out of range, or contradicts another.
    """

    def __init__(
        self,
        settings: ModelSettings | None = None,
        *,
        seed: int = 0,
        architecture: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.settings = settings or ModelSettings(**arguments)
        self.seed, self.architecture = seed, architecture
        self.save_hyperparameters(
            {**asdict(self.settings), "seed": seed, "architecture": architecture}
        )
        self.model: LlamaForCausalLM | None = None
        self.plan: FoldPlan | None = None
        self._memory_options: MemoryOptions | None = None
        self._validated = (0.0, 0)  # nats and tokens of the validation pass so far
        self.step_mean = StepMean()
        self.backward_guard: BackwardGuard | None = None
        self.host_gradients: HostGradients | None = None  # while it trains with grad_offload
        self._config: LlamaConfig | None = None
        self._group_options: list[dict[str, Any]] = []  # those of the settings

    # ---- the model, before any weight exists

    def llama_config(self) -> "LlamaConfig":
        """Return a new transformers configuration of the model."""
        self._config = self._config or model_config(self.settings, self.architecture)
        return deepcopy(self._config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by qualified name."""
        with torch.device("meta"):
            model = llama.create_uninitialized(self.llama_config())
        return {name: tuple(p.shape) for name, p in model.named_parameters()}

    @cached_property
    def foldable(self) -> dict[str, tuple[int, ...]]:
        """The shape of every foldable matrix, by qualified name."""
        exclude = self.settings.exclude
        return {name: s for name, s in self.shapes.items() if is_foldable(name, s, exclude)}

    def uniform_plan(self, level: int, memory_options: MemoryOptions) -> FoldPlan:
        """Return the plan with one fold level for all matrices, at the settings' learning rate."""
        settings = self.settings
        scale = settings.scale if level else settings.unfolded_scale
        return FoldPlan(
            model=llama.fingerprint(self.llama_config()),
            levels=dict.fromkeys(self.foldable, level),
            scales=dict.fromkeys(self.foldable, scale),
            lr=settings.lr,
            memory_options=memory_options,
        )

    def set_plan(self, plan: FoldPlan) -> None:
        """Set the plan to train by.

        Raises:
            PlanError: The plan was made for another model.
        """
        plan.check_model(llama.fingerprint(self.llama_config()), self.foldable)
        self.plan, self._memory_options = plan, plan.memory_options

    def build_for_trace(self, memory_options: MemoryOptions, num_layers: int) -> "LlamaFoam":
        """Build this model with another number of layers and no initial weights, for the account.

        Its tensors are created in the mode and on the device of the caller, such as fake tensors.
        """
        config = llama.set_num_layers(self.llama_config(), num_layers)
        traced = LlamaFoam(self.settings, architecture=self.architecture)
        traced._memory_options = memory_options
        traced._install(llama.create_uninitialized(config))
        return traced

    def layers(self) -> Sequence[torch.nn.Module]:
        """Return the decoder layers, first to last."""
        return list(self._built_model().model.layers)

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        # A model that is to be int8 may be too large for the device before.
        with torch.device("cpu") if self._stores_int8 else nullcontext():
            self._install(create_model(self.settings, self.architecture, seed=self.seed))
        if self.device_mesh is not None:  # FSDP2; until now the model is whole, in host memory
            shard(self, self.layers(), self.device_mesh["data_parallel"], self.trainer.precision)

    def make_optimizer(
        self, named_parameters: Iterable[tuple[str, Tensor]], plan: FoldPlan
    ) -> Optimizer:
        """Create the optimizer of the settings; for FOAM with the levels of the plan."""
        config = self.llama_config()
        sizes = {"hidden_size": config.hidden_size, "num_heads": config.num_attention_heads}
        return create_optimizer(named_parameters, plan, self.settings, **sizes)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self._built_model().named_parameters(), self._plan())
        schedule = LambdaLR(
            optimizer,
            learning_rate_factor(
                int(self.trainer.estimated_stepping_batches),
                schedule=self.settings.schedule,
                warmup_fraction=self.settings.warmup_fraction,
                decay_fraction=self.settings.decay_fraction,
                final_fraction=self.settings.final_lr_fraction,
            ),
        )
        self._group_options = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in optimizer.param_groups
        ]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    # ---- one step

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Run the decoder: token ids (B, S) to hidden states (B, S, hidden_size)."""
        model = self._built_model()
        length = input_ids.shape[1]
        llama.check_sequence_length(model.config, length)
        rope.check_rope_length(model.config, length)
        rope.fix_dynamic_frequencies(model)
        if self.training:  # what is exported declares it
            longest = max(length, model.config.max_position_embeddings)
            model.config.max_position_embeddings = longest
        # No mask: attention is causal, and padding is on the right, where no token is scored.
        hidden: Tensor = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden

    def mean_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the mean negative log-likelihood of the next tokens, in nats."""
        total, num_tokens = self._summed_loss(hidden, labels)
        return total / num_tokens

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        labels = batch["labels"]
        hidden, scaler = self.hidden_states(batch["input_ids"]), self.gradient_scaler
        scale = None if scaler is None else scaler.scale(torch.ones((), device=labels.device))
        total, num_tokens = self._summed_loss(hidden, labels, scale)
        loss = self.step_mean.backward_loss(total, num_tokens, labels, self.trainer)
        nats, count = self.step_mean.totals()  # of all micro-batches of the step so far
        self.log("train/loss", nats / count.clamp(min=1), prog_bar=True)
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        guard = self.backward_guard if self.updates_in_backward else None
        sums = self.host_gradients
        if guard is None or guard.allows_backward(loss):
            with nullcontext() if sums is None else sums.collect():
                super().backward(loss, *args, **kwargs)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        factor = self.step_mean.end_step(self.trainer)
        if factor is None:
            return
        if self.host_gradients is not None:
            self.host_gradients.scale_(factor)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        sums = self.host_gradients
        if sums is None:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
        elif gradient_clip_val:
            clips_values = gradient_clip_algorithm == "value"
            (sums.clip_values_ if clips_values else sums.clip_norm_)(gradient_clip_val)

    def clear_gradients(self, optimizer: Optimizer) -> None:
        """Drop all gradients of this step, wherever they are, so that it changes nothing."""
        optimizer.zero_grad(set_to_none=True)
        if self.host_gradients is not None:
            self.host_gradients.clear()

    @override
    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        # Hooks live for one step, so none is left after an error or on parameters replaced since.
        guard = self.backward_guard
        hook = () if guard is None else (guard.make_finite_,)
        with (
            release_gradients(optimizer.optimizer, *hook)
            if self.updates_in_backward
            else nullcontext()
        ):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.host_gradients is not None:  # the optimizer has found no gradients
            self.host_gradients.update(optimizer.optimizer)
        # Lightning frees gradients only after the next forward pass, which would raise its peak.
        optimizer.zero_grad(set_to_none=True)

    @override
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        with catch_warnings():
            # A gradient scaler may skip the first step of the optimizer; the schedule goes on.
            filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            super().lr_scheduler_step(scheduler, metric)

    @override
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        self.clear_gradients(optimizer)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        hidden = self.hidden_states(batch["input_ids"])
        total, num_tokens = self._summed_loss(hidden, batch["labels"])
        self._validated = (self._validated[0] + float(total), self._validated[1] + int(num_tokens))
        return {"nll": total, "num_tokens": num_tokens}

    @override
    def on_validation_epoch_end(self) -> None:
        scored = torch.tensor(self._validated, dtype=torch.float64, device=self.device)
        self._validated = (0.0, 0)
        nats, count = self.trainer.strategy.reduce(scored, reduce_op="sum").tolist()
        loss = torch.tensor(nats / count)
        self.log("validation/loss", loss, prog_bar=True, sync_dist=True)
        # A tensor's exp() is inf after divergence, where math.exp raises OverflowError.
        self.log("validation/perplexity", loss.exp(), sync_dist=True)

    # ---- hooks of Lightning

    @override
    def on_fit_start(self) -> None:
        rope.restore_rope_float32(self._built_model())

    @override
    def on_train_start(self) -> None:
        trainer, options = self.trainer, self._options()
        is_alone = isinstance(trainer.strategy, SingleDeviceStrategy)
        if options.grad_offload and not is_alone:
            raise ConfigError(
                f"grad_offload needs one device, got {type(trainer.strategy).__name__}, which "
                "averages gradients over devices; make a plan for them"
            )
        if options.updates_in_backward and (
            trainer.gradient_clip_val or trainer.accumulate_grad_batches != 1 or not is_alone
        ):
            raise ConfigError(
                "gradient release needs one device, trainer.accumulate_grad_batches 1 and no "
                "trainer.gradient_clip_val (set model.clip_norm or grad_offload instead); got "
                f"{type(trainer.strategy).__name__}, {trainer.accumulate_grad_batches} and "
                f"{trainer.gradient_clip_val}"
            )
        if options.grad_offload:
            self.host_gradients = HostGradients(self.parameters())
        self._use_own_settings()

    @override
    def on_train_end(self) -> None:
        self.host_gradients = None

    def _use_own_settings(self) -> None:
        """Train by the settings of this run, where Lightning has restored those of a checkpoint.

        It restores the settings of the groups together with the state of the optimizer, and the
        peak learning rates with the state of the schedule.
        """
        (optimizer,) = self.trainer.optimizers
        for group, options in zip(optimizer.param_groups, self._group_options, strict=True):
            group.update(options)
        (schedule,) = (config.scheduler for config in self.trainer.lr_scheduler_configs)
        assert isinstance(schedule, LambdaLR)
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        schedule._last_lr = [peak * factor(schedule.last_epoch) for peak, factor in rates]
        for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate

    @override
    def on_validation_start(self) -> None:
        rope.restore_rope_float32(self._built_model())

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fold_plan"] = self._plan().to_json()
        if self.settings.pretrained is not None:
            checkpoint["hyper_parameters"]["architecture"] = architecture_to_json(
                self._built_model()
            )

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "fold_plan" not in checkpoint:
            raise CheckpointError("the checkpoint has no fold plan; use one that this tool wrote")
        saved = FoldPlan.from_json(checkpoint["fold_plan"], source="the checkpoint's fold plan")
        if self.plan is None:
            self.set_plan(saved)
        saved.check_model(self._plan().model, self._plan().levels)

    def _plan(self) -> FoldPlan:
        if self.plan is None:
            raise ConfigError(_NO_PLAN)
        return self.plan

    @property
    def updates_in_backward(self) -> bool:
        """Whether parameters are updated inside backward."""
        return self._options().updates_in_backward

    @property
    def gradient_scaler(self) -> torch.amp.GradScaler | None:
        """What keeps float16 gradients in their range; None under other precisions."""
        plugin = self.trainer.precision_plugin
        return plugin.scaler if isinstance(plugin, MixedPrecision) else None

    @property
    def _stores_int8(self) -> bool:
        return self._memory_options is not None and self._memory_options.weights_dtype == "int8"

    def _options(self) -> MemoryOptions:
        if self._memory_options is None:
            raise ConfigError(_NO_PLAN)
        return self._memory_options

    def _built_model(self) -> "LlamaForCausalLM":
        if self.model is None:
            raise ConfigError("the model is not built; call configure_model() first")
        return self.model

    def _install(self, model: "LlamaForCausalLM") -> None:
        model.train()
        if self._stores_int8:
            use_int8_weights(model)
        options = self._memory_options
        if options is not None and options.activation_checkpointing:
            checkpoint_layers(model, selective=options.selective_checkpointing)
        self.model = model

    def _summed_loss(
        self, hidden: Tensor, labels: Tensor, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        head, chunked = self._built_model().lm_head, self._options().chunked_loss
        return token_loss(hidden, head, labels, chunked=chunked, scale=scale)

"""LLaMA trained with FOAM, as a LightningModule."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from foam_lightning.distributed.fsdp import shard
from foam_lightning.errors import CheckpointError, ConfigError
from foam_lightning.model import llama
from foam_lightning.model.activation_checkpointing import checkpoint_layers
from foam_lightning.model.loss import StepMean, token_loss
from foam_lightning.model.pretrained import architecture_to_json, create_model, model_config
from foam_lightning.optim.factory import create_optimizer
from foam_lightning.optim.gradient_release import BackwardGuard, release_gradients
from foam_lightning.optim.groups import is_foldable
from foam_lightning.plan import FoldPlan, MemoryOptions
from foam_lightning.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM


def warmup_cosine(
    num_steps: int, *, warmup_fraction: float, final_fraction: float
) -> Callable[[int], float]:
    """Give the learning-rate factor of every step: linear rise, then half a cosine.

    Args:
        num_steps: Optimizer steps of the whole run; the last one trains at `final_fraction`.
        warmup_fraction: Share of the steps that rise from near zero to 1.
        final_fraction: The factor at the end.
    """
    warmup_steps = max(1, round(num_steps * warmup_fraction))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step + 1 - warmup_steps) / max(1, num_steps - warmup_steps))
        return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


Batch = Mapping[str, Tensor]


class LlamaFoam(LightningModule):
    """A LLaMA and the optimizer that trains it, by a fold plan.

    Args:
        settings: Of the model and the optimizer.
        seed: Seeds the initial weights.
        architecture: What a checkpoint saved of the folder `settings.pretrained`, so that the model
            can be built without that folder.
        arguments: Instead of `settings`: those of `ModelSettings`, by name, as they are stored in a
            checkpoint.

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
        self._scored = (0.0, 0)  # nats and tokens of the validation pass so far
        self.step_mean = StepMean()
        self.backward_guard: BackwardGuard | None = None
        self._config: LlamaConfig | None = None

    # ---- what is trained, before a single weight exists

    def llama_config(self) -> "LlamaConfig":
        """Describe the model that these settings ask for; whoever asks may change it."""
        self._config = self._config or model_config(self.settings, self.architecture)
        return deepcopy(self._config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape by its qualified name."""
        with torch.device("meta"):
            model = llama.create_uninitialized(self.llama_config())
        return {name: tuple(p.shape) for name, p in model.named_parameters()}

    @cached_property
    def foldable(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the matrices that fold, by qualified name."""
        exclude = self.settings.exclude
        return {name: s for name, s in self.shapes.items() if is_foldable(name, s, exclude)}

    def uniform_plan(self, level: int, memory_options: MemoryOptions) -> FoldPlan:
        """Make the plan that holds every matrix at one level, at this module's settings."""
        settings = self.settings
        scale = settings.scale if level else settings.unfolded_scale
        return FoldPlan(
            model=llama.fingerprint(self.llama_config()),
            levels=dict.fromkeys(self.foldable, level),
            scales=dict.fromkeys(self.foldable, scale),
            lr=settings.lr,
            memory_options=memory_options,
        )

    def follow(self, plan: FoldPlan) -> None:
        """Train by this plan.

        Raises:
            PlanError: The plan was made for another model.
        """
        plan.check_model(llama.fingerprint(self.llama_config()), self.foldable)
        self.plan = plan

    def layered(self, memory_options: MemoryOptions, num_layers: int) -> "LlamaFoam":
        """Build a model of these sizes and options with so many layers, without weights.

        It lives where tensors are made now, such as in fake mode; the account traces it.
        """
        config = llama.set_num_layers(self.llama_config(), num_layers)
        proxy_model = LlamaFoam(self.settings, architecture=self.architecture)
        proxy_model.plan = FoldPlan(
            model={}, levels={}, scales={}, lr=1.0, memory_options=memory_options
        )
        proxy_model._adopt(llama.create_uninitialized(config))
        return proxy_model

    def layers(self) -> Sequence[torch.nn.Module]:
        """List the decoder layers, first to last."""
        return list(self._built().model.layers)

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        self._adopt(create_model(self.settings, self.architecture, seed=self.seed))
        if self.device_mesh is not None:  # FSDP2; until now the model is whole, in host memory
            shard(self, self.layers(), self.device_mesh["data_parallel"], self.trainer.precision)

    def make_optimizer(
        self, named_parameters: Iterable[tuple[str, Tensor]], plan: FoldPlan
    ) -> Optimizer:
        """Make the optimizer of the settings; FOAM takes the plan's levels."""
        config = self.llama_config()
        sizes = {"hidden_size": config.hidden_size, "num_heads": config.num_attention_heads}
        return create_optimizer(named_parameters, plan, self.settings, **sizes)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self._built().named_parameters(), self._plan())
        schedule = LambdaLR(
            optimizer,
            warmup_cosine(
                int(self.trainer.estimated_stepping_batches),
                warmup_fraction=self.settings.warmup_fraction,
                final_fraction=self.settings.final_lr_fraction,
            ),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    # ---- one step

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Run the decoder: token ids (B, S) to hidden states (B, S, H)."""
        model = self._built()
        llama.check_sequence_length(model.config, input_ids.shape[1])
        # No mask: rows are causal and padded on the right only, where nothing is scored.
        hidden: Tensor = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden

    def mean_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Score the next tokens: the mean negative log-likelihood in nats."""
        total, num_tokens = self._summed_loss(hidden, labels)
        return total / num_tokens

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        labels = batch["labels"]
        total, num_tokens = self._summed_loss(self.hidden_states(batch["input_ids"]), labels)
        self.log("train/loss", total.detach() / num_tokens.clamp(min=1), prog_bar=True)
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.step_mean.backward_loss(total, num_tokens, labels, self.trainer)

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        guard = self.backward_guard if self.releases else None
        if guard is None or guard.allows_backward(loss):
            super().backward(loss, *args, **kwargs)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.step_mean.rescale_gradients(self.parameters(), self.trainer)

    @override
    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        # For one step at a time: what a checkpoint or an error replaces or leaves is never hooked.
        guard = self.backward_guard
        hook = () if guard is None else (guard.make_finite_,)
        with release_gradients(optimizer.optimizer, *hook) if self.releases else nullcontext():
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Lightning frees gradients after the next forward pass, whose peak would then hold them.
        optimizer.zero_grad(set_to_none=True)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        hidden = self.hidden_states(batch["input_ids"])
        total, num_tokens = self._summed_loss(hidden, batch["labels"])
        self._scored = (self._scored[0] + float(total), self._scored[1] + int(num_tokens))
        return {"nll": total, "num_tokens": num_tokens}

    @override
    def on_validation_epoch_end(self) -> None:
        scored = torch.tensor(self._scored, dtype=torch.float64, device=self.device)
        self._scored = (0.0, 0)
        nats, count = self.trainer.strategy.reduce(scored, reduce_op="sum").tolist()
        loss = torch.tensor(nats / count)
        self.log("validation/loss", loss, prog_bar=True, sync_dist=True)
        # inf, not an error, where a run diverged
        self.log("validation/perplexity", loss.exp(), sync_dist=True)

    # ---- what Lightning would otherwise get wrong

    @override
    def on_fit_start(self) -> None:
        llama.restore_rope_float32(self._built())

    @override
    def on_train_start(self) -> None:
        trainer = self.trainer
        if self.releases and (
            trainer.gradient_clip_val
            or trainer.accumulate_grad_batches != 1
            or not isinstance(trainer.strategy, SingleDeviceStrategy)
        ):
            raise ConfigError(
                "gradient release needs one device, trainer.accumulate_grad_batches 1 and no "
                "trainer.gradient_clip_val (model.clip_norm clips each parameter by itself); got "
                f"{type(trainer.strategy).__name__}, {trainer.accumulate_grad_batches} and "
                f"{trainer.gradient_clip_val}"
            )

    @override
    def on_validation_start(self) -> None:
        llama.restore_rope_float32(self._built())

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fold_plan"] = self._plan().to_json()
        if self.settings.pretrained is not None:
            checkpoint["hyper_parameters"]["architecture"] = architecture_to_json(self._built())

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "fold_plan" not in checkpoint:
            raise CheckpointError("the checkpoint holds no fold plan; was it written by this tool?")
        saved = FoldPlan.from_json(checkpoint["fold_plan"], source="the checkpoint's fold plan")
        if self.plan is None:
            self.follow(saved)
        saved.check_model(self._plan().model, self._plan().levels)

    def _plan(self) -> FoldPlan:
        if self.plan is None:
            raise ConfigError("no fold plan is set; call follow(plan) before training")
        return self.plan

    @property
    def releases(self) -> bool:
        """Whether the optimizer steps inside backward."""
        return self._plan().memory_options.gradient_release

    def _built(self) -> "LlamaForCausalLM":
        if self.model is None:
            raise ConfigError("the model is not built; call configure_model() first")
        return self.model

    def _adopt(self, model: "LlamaForCausalLM") -> None:
        model.train()
        if self.plan is not None and self.plan.memory_options.activation_checkpointing:
            checkpoint_layers(model, selective=self.plan.memory_options.selective_checkpointing)
        self.model = model

    def _summed_loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return token_loss(
            hidden, self._built().lm_head, labels, chunked=self._plan().memory_options.chunked_loss
        )

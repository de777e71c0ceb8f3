"""Fold levels for any causal language model of transformers, for training loops of one's own."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from foam_lightning.errors import ConfigError
from foam_lightning.memory.account import Account, Accountant
from foam_lightning.memory.device import Gpu, load_costs
from foam_lightning.model.activation_checkpointing import checkpoint_layers
from foam_lightning.optim.foam import FOAM
from foam_lightning.optim.groups import foldable_shapes, param_groups
from foam_lightning.plan import FoldPlan, MemoryOptions, StateDtype
from foam_lightning.settings import ModelSettings, Precision
from foam_lightning.units import ByteSize
from tuner.planning.levels import LEVELS, LevelPlanner

_PRECISIONS: dict[torch.dtype, Precision] = {
    torch.float32: "32-true",
    torch.bfloat16: "bf16-true",
}


@dataclass(frozen=True)
class ModelPlan:
    """Fold levels that fit a budget, from `plan_for`.

    Attributes:
        levels: Fold level of every matrix that folds, by qualified name.
        scales: Factor on the learning rate, by the same names.
        state_dtype: The dtype of the moments.
        account: The predicted peak of a training step, term by term.
    """

    levels: Mapping[str, int]
    scales: Mapping[str, float]
    state_dtype: StateDtype
    account: Account

    @property
    def peak_bytes(self) -> int:
        """The predicted peak of a training step in bytes."""
        return self.account.peak_bytes

    def create_optimizer(
        self, model: nn.Module, lr: float, *, weight_decay: float = 0.0, **options: Any
    ) -> FOAM:
        """Create the optimizer of the plan.

        Args:
            model: The model that the plan was made for.
            lr: Peak learning rate, which `scales` multiply for the matrices.
            weight_decay: Decoupled weight decay of the matrices; other parameters have none.
            options: Other arguments of `FOAM`.
        """
        named = model.named_parameters()
        groups = param_groups(named, self.levels, self.scales, weight_decay)
        return FOAM(groups, lr, state_dtype=getattr(torch, self.state_dtype), **options)


def plan_for(
    model: Any,
    memory_budget: str | int,
    *,
    batch_size: int,
    sequence_length: int,
    state_dtype: StateDtype = "float32",
    device: str | None = None,
) -> ModelPlan:
    """Choose the fold level of every matrix of a model so that training fits a memory budget.

    The levels are those from which the tuner starts, before any short run; nothing is trained. The
    peak is that of the model's own forward pass with `labels`, its backward pass and a step of
    FOAM, traced on fake tensors, with the gradient checkpointing that the model has now. Embeddings
    and head do not fold. Not counted: an autocast context, copies by a data-parallel wrapper, a
    reference model. So train in the model's own dtype (in transformers' `Trainer` without `bf16`).

    Args:
        model: A causal language model of transformers, in float32 or bfloat16, on any device or on
            the meta device, with every parameter trainable.
        memory_budget: Memory of one device, such as "24GB" (24e9 bytes) or "24GiB", or bytes.
        batch_size: Sequences of one forward pass.
        sequence_length: Tokens of a sequence.
        state_dtype: The dtype of the moments: "float32", "bfloat16" or "int8".
        device: "cuda" or "cpu", where the model will train; by default a GPU if there is one. A GPU
            adds a context and the allocator's margin, which are measured where there is one.

    Raises:
        ConfigError: The model is in another dtype or has frozen parameters.
        InfeasibleBudgetError: No levels fit; the error names the smallest budget that would.
    """
    planner = _ModelPlanner(
        model,
        int(ByteSize(memory_budget)),
        MemoryOptions(micro_batch_size=batch_size, state_dtype=state_dtype),
        sequence_length,
        on_gpu=(device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda"),
    )
    if not planner.uniform_levels:
        account = planner.accountant.account(planner.uniform(LEVELS[-1]))
        raise planner.infeasible(
            account,
            subject="with every matrix at the highest level, this model",
            options=("batch_size", "memory_budget"),
        )
    plan = planner.default_plan()
    return ModelPlan(plan.levels, plan.scales, state_dtype, planner.accountant.account(plan))


class _ModelPlanner(LevelPlanner):
    def __init__(
        self,
        model: Any,
        budget_bytes: int,
        options: MemoryOptions,
        sequence_length: int,
        *,
        on_gpu: bool,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._model, self._options = _AnyModel(model), options
        self.accountant = Accountant(
            self._model,
            num_layers=self._model.llama_config().num_hidden_layers,
            sequence_length=sequence_length,
            precision=self._model.precision,
            on_gpu=on_gpu,
            costs=load_costs(Gpu()) if on_gpu and torch.cuda.is_available() else None,
        )

    @property
    def foldable(self) -> Mapping[str, tuple[int, ...]]:
        return self._model.foldable

    def uniform(self, level: int) -> FoldPlan:
        defaults = ModelSettings()
        return FoldPlan(
            model={},
            levels=dict.fromkeys(self.foldable, level),
            scales=dict.fromkeys(
                self.foldable, defaults.scale if level else defaults.unfolded_scale
            ),
            lr=defaults.lr,
            memory_options=self._options,
        )


class _AnyModel:
    """What the account needs of a model, an `AccountedModel`."""

    def __init__(self, model: Any) -> None:
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        if frozen:
            raise ConfigError(
                f"plan_for needs a model whose parameters all train, and {len(frozen)} are frozen, "
                f"the first is {frozen[0]}"
            )
        dtypes = {parameter.dtype for parameter in model.parameters()}
        if len(dtypes) != 1 or not dtypes <= _PRECISIONS.keys():
            raise ConfigError(
                "plan_for needs a model in float32 or bfloat16, got "
                f"{', '.join(sorted(map(str, dtypes)))}; convert it with model.to(torch.bfloat16)"
            )
        self.precision = _PRECISIONS[dtypes.pop()]
        self._model = model

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self._model.named_parameters()}

    @cached_property
    def foldable(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all matrices but embeddings and head, by name."""
        embeddings = [m for m in self._model.modules() if isinstance(m, nn.Embedding)]
        head = self._model.get_output_embeddings()
        kept = {id(module.weight) for module in [*embeddings, *([head] if head else [])]}
        named = self._model.named_parameters()
        return foldable_shapes((n, p) for n, p in named if id(p) not in kept)

    def llama_config(self) -> Any:
        return self._model.config

    def build_for_trace(self, memory_options: MemoryOptions, num_layers: int) -> "_Traced":
        del memory_options
        config = deepcopy(self._model.config)
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:num_layers]
        # The fake device is the CPU, where flash attention is sdpa; what it saves is the same.
        is_eager = self._model.config._attn_implementation == "eager"
        attention = "eager" if is_eager else "sdpa"
        model = type(self._model)._from_config(config, attn_implementation=attention)
        model.train()
        if any(getattr(part, "gradient_checkpointing", False) for part in self._model.modules()):
            checkpoint_layers(model, selective=False)
        return _Traced(model)

    def make_optimizer(
        self, named_parameters: Iterable[tuple[str, Tensor]], plan: FoldPlan
    ) -> torch.optim.Optimizer:
        groups = param_groups(named_parameters, plan.levels, plan.scales, weight_decay=0.0)
        return FOAM(groups, state_dtype=getattr(torch, plan.memory_options.state_dtype))


class _Traced:
    """A model as the trace runs it, a `Traceable`: its loss is that of its own forward pass."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(self._model.parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._model.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._model.named_buffers())

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(self._model.named_modules())

    def layers(self) -> Sequence[nn.Module]:
        count = self._model.config.num_hidden_layers
        lists = [list(m) for m in self._model.modules() if isinstance(m, nn.ModuleList)]
        return next(layers for layers in lists if len(layers) == count)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        loss: Tensor = self._model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        return loss

    def mean_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        del labels  # already in the forward pass
        return hidden

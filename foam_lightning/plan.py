"""The fold plan: the fold level of every matrix, and the settings chosen together with it."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from foam_lightning.errors import PlanError, one_line
from foam_lightning.storage.atomic import write_text
from foam_lightning.validation import MODEL, POSITIVE

_SCHEMAS = tuple(f"foam-lightning/fold-plan/{number}" for number in (1, 2, 3))
SCHEMA = _SCHEMAS[-1]
# Fields that had other names up to schema 2.
_RENAMED = {"levers": "memory_options", "twin": "proxy_model"}
_MAX_CHARACTERS = 300  # of the reason in an error

StateDtype = Literal["float32", "bfloat16", "int8"]
WeightsDtype = Literal["int8"]
Fingerprint = Mapping[str, int | bool]


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Options that trade speed for memory, besides fold levels.

    Attributes:
        micro_batch_size: Sequences per forward pass, 1 or more.
        accumulate_grad_batches: Forward passes per optimizer step on one device.
        chunked_loss: Compute the head and the cross entropy for a few tokens at a time, so that the
            logits of a whole micro-batch never exist at once.
        activation_checkpointing: Save only the input of each decoder layer, and recompute its
            activations in the backward pass.
        selective_checkpointing: Also save the results of matrix products and attention, so that
            only cheap operations are recomputed. Needs activation_checkpointing.
        gradient_release: Update each parameter inside the backward pass and free its gradient.
            Needs accumulate_grad_batches 1 or grad_offload.
        grad_offload: Sum released gradients in host memory, and update after the last micro-batch.
            Needs gradient_release.
        state_dtype: The dtype of the two moments: "float32", "bfloat16" or "int8".
        state_offload: Keep the moments in host memory, and copy them to the GPU for their update.
        weights_dtype: "int8" stores the matrices of the decoder layers in int8, which needs
            gradient_release in a run; None stores them as the precision says.

    Raises:
        PlanError: Two options contradict each other.
    """

    micro_batch_size: int
    accumulate_grad_batches: int = 1
    chunked_loss: bool = False
    activation_checkpointing: bool = False
    selective_checkpointing: bool = False
    gradient_release: bool = False
    grad_offload: bool = False
    state_dtype: StateDtype = "float32"
    state_offload: bool = False
    weights_dtype: WeightsDtype | None = None

    def __post_init__(self) -> None:
        if self.grad_offload and not self.gradient_release:
            raise PlanError("grad_offload needs gradient_release; set both")
        if self.updates_in_backward and self.accumulate_grad_batches != 1:
            raise PlanError(
                "gradient_release needs accumulate_grad_batches 1, got "
                f"{self.accumulate_grad_batches!r}; set micro_batch_size to the whole batch, or "
                "grad_offload"
            )
        if self.selective_checkpointing and not self.activation_checkpointing:
            raise PlanError("selective_checkpointing needs activation_checkpointing; set both")

    @property
    def updates_in_backward(self) -> bool:
        """Whether the backward pass updates the parameters, so that it is the whole step."""
        return self.gradient_release and not self.grad_offload

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step on one device."""
        return self.micro_batch_size * self.accumulate_grad_batches


@dataclass(frozen=True, kw_only=True)
class FoldPlan:
    """What a run gets from the tuner.

    Attributes:
        model: Sizes by name of the model that the plan is for (its fingerprint).
        levels: Fold level of every foldable matrix, by qualified parameter name.
        scales: Factor on the learning rate, above 0, by the same names.
        lr: Peak learning rate.
        memory_options: The other memory options.
        proxy_model: Sizes of the narrower model that the plan was tuned on; None if it was this
            model. For information only: a run does not depend on it.
    """

    model: Fingerprint
    levels: Mapping[str, int]
    scales: Mapping[str, float]
    lr: float
    memory_options: MemoryOptions
    proxy_model: Fingerprint | None = None

    def to_json(self) -> str:
        """Return the plan as JSON; equal plans give equal texts."""
        content: dict[str, Any] = {"schema": SCHEMA, **asdict(self)}
        content["scales"] = {name: self.scales[name] for name in self.levels}
        if self.proxy_model is None:
            del content["proxy_model"]
        if self.memory_options.weights_dtype is None:  # so that earlier versions read the plan
            del content["memory_options"]["weights_dtype"]
        if not self.memory_options.grad_offload:
            del content["memory_options"]["grad_offload"]
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "the fold plan") -> Self:
        """Read a plan back.

        Args:
            text: JSON of this schema or an earlier one.
            source: Name of the text in an error, such as its path.

        Raises:
            PlanError: The text is not JSON, has an unknown schema, or a field is missing, unknown,
                or has a value of the wrong type or range.
        """
        try:
            content = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{source} is not JSON ({error}); use a fold_plan.json") from error
        schema = content.pop("schema", None) if isinstance(content, dict) else None
        if schema not in _SCHEMAS:
            raise PlanError(
                f"{source} is not a fold plan: its schema must be one of {', '.join(_SCHEMAS)}"
            )
        try:
            if schema != SCHEMA:
                content = {_RENAMED.get(key, key): value for key, value in content.items()}
            if schema == _SCHEMAS[0]:  # had one scale per level, such as {"2": 0.25}
                content["scales"] = _scales_by_name(content["scales"], content["levels"])
            plan = cls(**{**content, "memory_options": MemoryOptions(**content["memory_options"])})
            plan._check()
        except KeyError as error:
            missing = str(error)[:_MAX_CHARACTERS]
            raise PlanError(f"{source} is not a valid fold plan: it has no {missing}") from error
        except (TypeError, ValueError, AttributeError, PlanError) as error:
            # A name in the text may be long and contain line breaks.
            reason = one_line(error)[:_MAX_CHARACTERS]
            raise PlanError(f"{source} is not a valid fold plan: {reason}") from error
        return plan

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a plan from a file.

        Raises:
            PlanError: The file cannot be read or is not a valid plan.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the fold plan {path}: {error}") from error
        return cls.from_json(text, source=str(path))

    def save(self, path: Path) -> None:
        """Write the plan atomically."""
        write_text(path, self.to_json())

    def check_model(self, model: Fingerprint, foldable: Collection[str]) -> None:
        """Check that the plan was made for a model.

        Args:
            model: The fingerprint of the model.
            foldable: The names of its foldable matrices.

        Raises:
            PlanError: The model differs; names the first difference.
        """
        for key in (*self.model, *model):
            ours, theirs = self.model.get(key), model.get(key)
            if ours != theirs:
                raise PlanError(
                    f"the fold plan is for a model with {key} {ours}, this one has {theirs}; "
                    "tune this model, or use the configuration that the plan was made with"
                )
        for name in (*self.levels, *foldable):
            if (name in self.levels) != (name in foldable):
                where = "the fold plan" if name in self.levels else "the model"
                raise PlanError(
                    f"{name} is foldable in {where} only; tune this model, or set model.exclude as "
                    "it was for the plan"
                )

    def _check(self) -> None:
        for model, sizes in (
            ("model", self.model),
            ("proxy_model", {} if self.proxy_model is None else self.proxy_model),
        ):
            for key, size in sizes.items():
                _expect(isinstance(size, int), f"{model}.{key} must be an integer, got {size!r}")
        for name, level in self.levels.items():
            _expect(
                _is_count(level, 0) and MODEL["level"].holds(level),
                f"the level of {name} must be {MODEL['level']}, got {level!r}",
            )
            _expect(name in self.scales, f"{name} has a level but no scale")
        for name, scale in self.scales.items():
            _expect(name in self.levels, f"{name} has a scale but no level")
            _expect(_is_positive(scale), f"the scale of {name} must be above 0, got {scale!r}")
        _expect(_is_positive(self.lr), f"lr must be above 0, got {self.lr!r}")
        for field in fields(MemoryOptions):
            value = getattr(self.memory_options, field.name)
            if field.type is int:
                _expect(_is_count(value, 1), f"{field.name} must be 1 or more, got {value!r}")
            elif field.type is bool:
                _expect(isinstance(value, bool), f"{field.name} must be a bool, got {value!r}")
        dtype = self.memory_options.state_dtype
        _expect(
            dtype in get_args(StateDtype),
            f"state_dtype must be one of {', '.join(get_args(StateDtype))}, got {dtype!r}",
        )
        weights_dtype = self.memory_options.weights_dtype
        _expect(
            weights_dtype is None or weights_dtype in get_args(WeightsDtype),
            f"weights_dtype must be int8 or null, got {weights_dtype!r}",
        )


def _scales_by_name(by_level: Mapping[str, float], levels: Mapping[str, int]) -> dict[str, float]:
    scales = {int(level): scale for level, scale in by_level.items()}
    for name, level in levels.items():
        _expect(level in scales, f"{name} has level {level!r}, which has no scale")
    return {name: scales[level] for name, level in levels.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate keys, of which json keeps the last."""
    content = dict(pairs)
    _expect(len(content) == len(pairs), "a key appears twice in one object")
    return content


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_count(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return POSITIVE.holds(value)

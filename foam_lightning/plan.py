"""The fold plan: which level every matrix trains at, and the settings found together with it."""

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
# Names of the fields up to schema 2.
_RENAMED = {"levers": "memory_options", "twin": "proxy_model"}

_MOST_CHARACTERS = 300  # of what an error says of a plan

StateDtype = Literal["float32", "bfloat16", "int8"]
Fingerprint = Mapping[str, int | bool]


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What a run trades speed for memory with, besides fold levels.

    Attributes:
        micro_batch_size: Sequences per forward pass, 1 or more.
        accumulate_grad_batches: Forward passes per optimizer step; times `micro_batch_size` it is
            the global batch.
        chunked_loss: Head and cross entropy run on a few tokens at a time, so that the logits of
            a whole micro-batch never exist at once.
        activation_checkpointing: Decoder layers keep only their input and recompute the rest.
        selective_checkpointing: Checkpointed layers keep the results of matrix products and
            attention too, and recompute only what is cheap.
        gradient_release: The optimizer steps inside backward, and each gradient dies at once; so
            there is none to accumulate.
        state_dtype: The dtype of the two moments, "float32", "bfloat16" or "int8".
        state_offload: The moments live in host memory and visit the device for their update.
    """

    micro_batch_size: int
    accumulate_grad_batches: int = 1
    chunked_loss: bool = False
    activation_checkpointing: bool = False
    selective_checkpointing: bool = False
    gradient_release: bool = False
    state_dtype: StateDtype = "float32"
    state_offload: bool = False

    def __post_init__(self) -> None:
        """Refuse memory options that contradict each other.

        Raises:
            PlanError: Gradients would be released and accumulated, or checkpointing is selective
                and off.
        """
        if self.gradient_release and self.accumulate_grad_batches != 1:
            raise PlanError(
                "gradient_release needs accumulate_grad_batches 1, got "
                f"{self.accumulate_grad_batches!r}; make micro_batch_size the whole batch"
            )
        if self.selective_checkpointing and not self.activation_checkpointing:
            raise PlanError("selective_checkpointing needs activation_checkpointing; set both")

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.micro_batch_size * self.accumulate_grad_batches


@dataclass(frozen=True, kw_only=True)
class FoldPlan:
    """Everything a run takes over from the tuner.

    Attributes:
        model: The fingerprint of the model that the plan is for: its sizes by name.
        levels: Fold level by qualified parameter name, for every matrix that folds.
        scales: The factor on the learning rate by qualified parameter name, above 0; the names
            are those of `levels`.
        lr: The peak learning rate.
        memory_options: The other memory settings.
        proxy model: The fingerprint of the narrower model that it was found on; None if on this
        one. It
            says what the plan rests on, and changes nothing in a run.
    """

    model: Fingerprint
    levels: Mapping[str, int]
    scales: Mapping[str, float]
    lr: float
    memory_options: MemoryOptions
    proxy_model: Fingerprint | None = None

    def to_json(self) -> str:
        """Write the plan as JSON text with a fixed order of keys, so that equal plans are equal."""
        content = {"schema": SCHEMA, **asdict(self)}
        content["scales"] = {name: self.scales[name] for name in self.levels}
        if self.proxy_model is None:
            del content["proxy_model"]
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "the fold plan") -> Self:
        """Read a plan back.

        Args:
            text: What `to_json` wrote, now or when a plan had a scale by level.
            source: What to call the text in an error, such as its file name.

        Raises:
            PlanError: The text is not JSON, has another schema, or a field is missing, unknown or
                of the wrong type or range.
        """
        try:
            content = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{source} is not JSON ({error}); pass a fold_plan.json") from error
        schema = content.pop("schema", None) if isinstance(content, dict) else None
        if schema not in _SCHEMAS:
            raise PlanError(
                f"{source} is not a fold plan: its schema must be one of {', '.join(_SCHEMAS)}"
            )
        try:
            if schema != SCHEMA:
                content = {_RENAMED.get(key, key): value for key, value in content.items()}
            if schema == _SCHEMAS[0]:  # one scale for all matrices of a level, as {"2": 0.25}
                content["scales"] = _spread(content["scales"], content["levels"])
            plan = cls(**{**content, "memory_options": MemoryOptions(**content["memory_options"])})
            plan._check()
        except KeyError as error:
            missing = str(error)[:_MOST_CHARACTERS]
            raise PlanError(f"{source} is not a valid fold plan: it has no {missing}") from error
        except (TypeError, ValueError, AttributeError, PlanError) as error:
            # A name in the text may be long and hold line breaks; a message is one line.
            reason = one_line(error)[:_MOST_CHARACTERS]
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
        """Write the plan beside `path` and rename it, so that no half plan is ever seen."""
        write_text(path, self.to_json())

    def check_model(self, model: Fingerprint, foldable: Collection[str]) -> None:
        """Refuse a model that the plan was not made for.

        Args:
            model: The fingerprint of the model about to train.
            foldable: The names of its matrices that fold.

        Raises:
            PlanError: Names the first difference.
        """
        for key in (*self.model, *model):
            ours, theirs = self.model.get(key), model.get(key)
            if ours != theirs:
                raise PlanError(
                    f"the fold plan is for a model with {key} {ours}, this one has {theirs}; "
                    "tune this model, or pass the configuration that the plan was made with"
                )
        for name in (*self.levels, *foldable):
            if (name in self.levels) != (name in foldable):
                where = "the fold plan" if name in self.levels else "the model"
                raise PlanError(
                    f"{name} folds in {where} only; tune this model, or set the model.exclude "
                    "that the plan was made with"
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
            _expect(name in self.scales, f"{name} has a level and no scale; give it one")
        for name, scale in self.scales.items():
            _expect(name in self.levels, f"{name} has a scale and no level; give it one")
            _expect(_is_positive(scale), f"the scale of {name} must be above 0, got {scale!r}")
        _expect(_is_positive(self.lr), f"lr must be above 0, got {self.lr!r}")
        for field in fields(MemoryOptions):
            value = getattr(self.memory_options, field.name)
            if field.type is int:
                _expect(_is_count(value, 1), f"{field.name} must be 1 or more, got {value!r}")
            elif field.type is bool:
                _expect(isinstance(value, bool), f"{field.name} must be a bool, got {value!r}")
        dtype = self.memory_options.state_dtype
        _expect(dtype in get_args(StateDtype), f"state_dtype {dtype!r} is not known")


def _spread(by_level: Mapping[str, float], levels: Mapping[str, int]) -> dict[str, float]:
    """Give every matrix the scale of its level."""
    scales = {int(level): scale for level, scale in by_level.items()}
    for name, level in levels.items():
        _expect(level in scales, f"{name} has level {level!r}, which has no scale")
    return {name: scales[level] for name, level in levels.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a mapping of what JSON holds; of a key that is there twice nobody knows which counts."""
    content = dict(pairs)
    _expect(len(content) == len(pairs), "it says a key twice in one place")
    return content


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return POSITIVE.holds(value)

"""The settings of a run, one class for each section of the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from foam_lightning.errors import ConfigError
from foam_lightning.plan import StateDtype, WeightsDtype
from foam_lightning.validation import DATA, MODEL, TRAINER, check_pattern, check_ranges

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger

OptimizerName = Literal[
    "foam", "adamw", "split_adamw", "galore", "apollo", "fira", "adam_mini", "muon", "adamw8bit"
]
ScheduleName = Literal["cosine", "linear", "constant", "wsd"]
Precision = Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed"]
# Lightning's short names, which YAML may read as numbers.
_SHORT_PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
# Each row of an embedding or of the head belongs to one token and is rarely touched. The rule is
# the one of the released FOAM code.
DEFAULT_EXCLUDE = r"embed_tokens|lm_head"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model and its optimizer: the section `model`.

    A fold plan, if there is one, replaces level, the scales, lr and the memory options.

    Args:
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the MLP.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Number of query heads; must divide hidden_size.
        num_key_value_heads: Number of key and value heads, fewer than query heads for grouped
            queries; null means as many as query heads.
        vocab_size: Number of token ids; also the size of a tokenizer that is trained here.
        max_position_embeddings: The longest sequence that the exported model declares.
        pretrained: Hugging Face folder to start from (LLaMA, SmolLM, Mistral, Qwen2, Qwen3, Phi-3,
            Gemma or Gemma 3); its sizes replace those above.
        optimizer: FOAM, or a baseline. A baseline uses lr, betas, eps and weight_decay, and
            unfolded_scale if it has a second learning rate; the settings below are for FOAM.
        lr: Peak learning rate.
        betas: Decay rates of the two moments. The scripts of the FOAM paper pass (0.9, 0.95), but
            its released code ran with this default.
        eps: Added to the denominator after bias correction.
        weight_decay: Decoupled weight decay of the foldable matrices; other parameters have none.
        level: Fold level of every foldable matrix: 2**level neighbouring columns share one pair of
            moments. Level 0 is Adam.
        scale: Factor on lr for folded matrices (level 1 or more).
        unfolded_scale: Factor on lr for foldable matrices at level 0. 0.1 is best for Adam with a
            split learning rate; 1 is plain AdamW.
        residual_scale: Weight of the residual, rho in the FOAM paper.
        second_moment: "mean_square" averages the squared gradients of a block, as the released
            code does; "square_mean" squares their average, as the paper prints.
        bias_correct_moments_only: Leave the residual out of the bias correction.
        state_dtype: The dtype of the two moments: float32, bfloat16, or int8 with a scale per
            group.
        clip_norm: The gradient of each parameter is scaled down to this norm; null does not clip.
            Unlike trainer.gradient_clip_val it does not need all gradients at once.
        stochastic_rounding: Round bfloat16 weights and bfloat16 or int8 moments at random, without
            bias. Rounding to nearest loses small updates.
        gradient_release: Update each parameter during the backward pass and free its gradient at
            once. Needs a step of one micro-batch. A memory budget turns it on where needed.
        grad_offload: Free each gradient at once, but sum the micro-batches of a step in host
            memory, which moves all gradients over the bus twice per micro-batch. A memory budget
            turns it on last.
        state_offload: Keep both moments in host memory and copy them to the GPU for their update,
            which moves twice their bytes per step. A memory budget turns it on last but one.
        weights_dtype: int8 stores the matrices of the decoder layers in one byte a weight and a
            scale per 128 of them, half the bytes of bfloat16; null stores them as
            trainer.precision says. Needs gradient_release, which a memory budget turns on, and one
            device.
        max_skipped_steps: Stop after this many steps in a row with a loss or gradient that is not
            finite; such steps are skipped.
        max_rollbacks: How often a run may return to its last checkpoint after a loss spike; the
            data goes on after the spike. 0 does not look for spikes.
        spike_nats: A loss this far above the mean of the last 50 steps is a spike.
        schedule: Course of the learning rate after the warm-up: along half a cosine, along a line,
            constant, or constant and then along a line at the end (wsd: warm-up, stable, decay).
            The short runs of the search have the same schedule.
        warmup_fraction: Fraction of the steps over which the learning rate rises.
        decay_fraction: Fraction of the steps over which the learning rate falls, for wsd.
        final_lr_fraction: Learning rate of the last step, as a fraction of the peak; a constant one
            does not fall.
        exclude: Regular expression; matrices whose name contains a match never fold.

    Raises:
        ConfigError: A setting is out of range, or contradicts another.
    """

    hidden_size: int = 128
    intermediate_size: int = 352
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    vocab_size: int = 1024
    max_position_embeddings: int = 2048
    pretrained: str | None = None
    optimizer: OptimizerName = "foam"
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    level: int = 2
    scale: float = 0.25
    unfolded_scale: float = 0.1
    residual_scale: float = 1.0
    second_moment: Literal["mean_square", "square_mean"] = "mean_square"
    bias_correct_moments_only: bool = False
    state_dtype: StateDtype = "float32"
    clip_norm: float | None = None
    stochastic_rounding: bool = True
    gradient_release: bool = False
    grad_offload: bool = False
    state_offload: bool = False
    weights_dtype: WeightsDtype | None = None
    max_skipped_steps: int = 10
    max_rollbacks: int = 0
    spike_nats: float = 1.0
    schedule: ScheduleName = "cosine"
    warmup_fraction: float = 0.1
    decay_fraction: float = 0.2
    final_lr_fraction: float = 0.1
    exclude: str = DEFAULT_EXCLUDE

    def __post_init__(self) -> None:
        check_ranges("model.", vars(self), MODEL)
        check_pattern("model.exclude", self.exclude)
        offloads = self.state_offload or self.grad_offload
        foam_only = self.gradient_release or offloads or self.clip_norm
        if self.optimizer != "foam" and (foam_only or self.weights_dtype):
            raise ConfigError(
                f"model.optimizer {self.optimizer} does not support model.gradient_release, "
                "model.state_offload, model.grad_offload, model.weights_dtype or "
                "model.clip_norm, which need foam; "
                "leave them out"
            )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The text and its batches: the section `data`.

    Without `files`, `dataset` and `sources` the text is the source code of Python's standard
    library, which needs no download.

    Args:
        files: Training text: files, folders and patterns such as "texts/**/*.txt". A .txt file is
            one document; so is each record of .jsonl, .json, .csv and .parquet. All but the last
            may be packed, such as .jsonl.gz or .txt.zst.
        validation_files: Text to evaluate on; by default 5 percent of `files` is held out.
        text_column: Column of the text in `dataset` and in files of records; those without it may
            have a column "input_ids" with token ids of `tokenizer`.
        dataset: Name of a dataset on the Hugging Face Hub with train and validation splits.
        dataset_config: Its configuration, such as "en", if it has several.
        sources: Several sources instead of one. Each has a `weight`, its relative share of the
            training and validation rows, and `files` or `dataset` with their settings.
        streaming: Read the text while training: `dataset` over the network instead of a download,
            `files` without a tokenized copy on disk.
        chat: The `files` are conversations, each file in one of the forms of docs/data.md. Only
            responses are learned. Each conversation is one padded row, whatever `packing` says.
        tokenizer: A local folder, a checkpoint, or a name on the Hub; by default that of
            model.pretrained, or else one is trained on the text.
        class_path: A LightningDataModule of your own instead of text, such as my_data.MyData. The
            command line has to allow it, with --allow-class-paths.
        init_args: Arguments of its constructor by name.
        sequence_length: Tokens per row.
        packing: Fill every row with consecutive documents. Otherwise each document is one row,
            truncated or padded, as in the FOAM paper.
        batch_size: Rows per optimizer step, over all devices and accumulated micro-batches.
        micro_batch_size: Rows per forward pass on one device; by default `batch_size`. It changes
            memory and speed, but not which rows a step sees.
        validation_sequences: Rows to evaluate on, the same ones each time; fewer if the text is
            short.
        num_workers: Processes that load batches; 0 loads them in the training process. With 2 or
            more, streamed rows come in another order.
        cache_dir: Folder of prepared data; by default foam-lightning in $XDG_CACHE_HOME or
            ~/.cache.
        vocab_size: Number of token ids of the model, which limits `tokenizer`; that of the section
            `model`.

    Raises:
        ConfigError: A setting is out of range.
    """

    files: list[str] | str | None = None
    validation_files: list[str] | str | None = None
    text_column: str = "text"
    dataset: str | None = None
    dataset_config: str | None = None
    sources: list[dict[str, Any]] | None = None
    streaming: bool = False
    chat: bool = False
    tokenizer: str | None = None
    class_path: str | None = None
    init_args: dict[str, Any] | None = None
    sequence_length: int = 64
    packing: bool = True
    batch_size: int = 8
    micro_batch_size: int | None = None
    validation_sequences: int = 256
    num_workers: int = 0
    cache_dir: str | None = None
    vocab_size: int = 1024

    def __post_init__(self) -> None:
        check_ranges("data.", vars(self), DATA)
        if self.class_path is None and self.init_args is not None:
            raise ConfigError("data.init_args needs data.class_path, whose arguments they are")
        given = [name for name in _OF_TEXT if getattr(self, name) not in (None, False)]
        if self.class_path is not None and given:
            raise ConfigError(
                f"data.class_path and data.{given[0]} are both set; leave one of them out"
            )


# Which text it is, and how it is read; a data module of somebody's own has neither.
_OF_TEXT = (
    *("files", "validation_files", "dataset", "dataset_config", "sources"),
    *("streaming", "chat"),
)


# Arguments of Lightning's Trainer that a run cannot have: their values that change nothing, and why
# any other is refused.
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "accelerator": (
        ("auto", "cpu", "gpu", "cuda"),
        "memory is known for CPUs and GPUs only; use auto, cpu, gpu or cuda",
    ),
    "accumulate_grad_batches": (
        (1,),
        "it follows from data.batch_size and data.micro_batch_size; set data.micro_batch_size "
        "instead",
    ),
    "barebones": ((False,), "it saves nothing of a run; leave it out"),
    "default_root_dir": ((), "the folder follows from --runs and --name; leave it out"),
    "enable_checkpointing": ((True,), "a run resumes from its checkpoints; leave it out"),
    "fast_dev_run": ((False,), "it saves nothing of a run; set trainer.max_steps 2 instead"),
    "limit_predict_batches": ((), "nothing is predicted; leave it out"),
    "limit_test_batches": ((), "nothing is tested; set trainer.limit_val_batches"),
    "model_registry": ((), "nothing is uploaded; the run folder has the model in hf/"),
    "overfit_batches": (
        (0,),
        "every epoch shuffles all rows; put the few to learn by heart into data.files instead",
    ),
    "reload_dataloaders_every_n_epochs": (
        (0,),
        "a run resumes at the row where it ended, which needs one loader; leave it out",
    ),
    "sync_batchnorm": ((False,), "a LLaMA has no batch normalization; leave it out"),
    "use_distributed_sampler": (
        (True,),
        "every device has rows of its own in any case; leave it out",
    ),
}


@dataclass(frozen=True)
class TrainerSettings:
    """Arguments of Lightning's Trainer: the section `trainer`.

    The framework itself reads a few of them, by the properties below; Lightning gets them all.

    Args:
        arguments: By name, as Lightning takes them; those left out have Lightning's defaults.

    Raises:
        ConfigError: An argument is out of range, is not supported, or follows from other settings.
    """

    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        precision = full_precision_name(self.arguments.get("precision"))
        object.__setattr__(self, "arguments", {**self.arguments, "precision": precision})
        for name, (allowed, reason) in _REFUSED.items():
            value = self.arguments.get(name)
            if value is not None and value not in allowed:
                raise ConfigError(f"trainer.{name} {value} is not supported: {reason}")
        clipping = self.arguments.get("gradient_clip_algorithm")
        if clipping and not self.gradient_clip_val:
            raise ConfigError(
                f"trainer.gradient_clip_algorithm {clipping} needs trainer.gradient_clip_val, what "
                "to clip to"
            )
        every_n_epochs = self.arguments.get("check_val_every_n_epoch")
        if self.validates_by_steps and every_n_epochs not in (None, 1):
            raise ConfigError(
                "trainer.check_val_every_n_epoch needs a trainer.val_check_interval that is a "
                "fraction of an epoch, such as 1.0; a whole number counts optimizer steps, across "
                "epochs"
            )
        ends_by_epochs = self.max_steps == -1 and self.max_epochs is not None
        max_steps = None if ends_by_epochs else self.max_steps
        check_ranges("trainer.", {**self.arguments, "max_steps": max_steps}, TRAINER)

    def replace(self, **arguments: Any) -> Self:
        """Return these settings with some arguments replaced."""
        return type(self)({**self.arguments, **arguments})

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the full run; -1 while only `max_epochs` limits them."""
        steps = self.arguments.get("max_steps")
        return -1 if steps is None else int(steps)

    @property
    def max_epochs(self) -> int | None:
        """Passes over the training rows; None where only `max_steps` ends the run."""
        value: int | None = self.arguments.get("max_epochs")
        return None if value == -1 else value

    @property
    def epoch_limit(self) -> int | float:
        """How much of an epoch is used: an int counts batches, a float is a share."""
        limit: int | float | None = self.arguments.get("limit_train_batches")
        return 1.0 if limit is None else limit

    @property
    def precision(self) -> Precision:
        """Lightning's name of the precision, which `trace.weight_dtype` checks."""
        return cast(Precision, self.arguments["precision"] or "32-true")

    @property
    def scales_gradients(self) -> bool:
        """Whether a gradient scaler keeps float16 gradients in their range."""
        return self.precision == "16-mixed"

    @property
    def is_on_gpu(self) -> bool:
        """Whether the run is meant for a GPU, present or not: unless the accelerator is "cpu"."""
        return self.arguments.get("accelerator") != "cpu"

    @property
    def devices(self) -> int | str | list[int] | None:
        """Lightning's `devices`: a number, or which ones."""
        devices: int | str | list[int] | None = self.arguments.get("devices")
        return devices

    @property
    def validates_by_steps(self) -> bool:
        """Whether `val_check_interval` counts optimizer steps or time, across epochs."""
        interval = self.arguments.get("val_check_interval")
        return interval is not None and not isinstance(interval, float)

    @property
    def callbacks(self) -> list["Callback"]:
        """The callbacks that the settings name, for the full run."""
        return _as_list(self.arguments.get("callbacks"))

    @property
    def loggers(self) -> list["str | bool | Logger"]:
        """The loggers that the settings name, beside TensorBoard."""
        return _as_list(self.arguments.get("logger"))

    @property
    def gradient_clip_val(self) -> float | None:
        """The norm that all gradients together are clipped to; None does not clip."""
        value: float | None = self.arguments.get("gradient_clip_val")
        return value

    @property
    def has_progress_bar(self) -> bool:
        """Whether progress is shown; it is by default."""
        return self.arguments.get("enable_progress_bar") is not False


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def full_precision_name(precision: str | int | None) -> str | None:
    """Return Lightning's full name of a precision: "bf16" and 16 are "bf16-mixed" and "16-mixed".

    So a run is recorded, and found again, under one name. None and unknown names stay.
    """
    return None if precision is None else _SHORT_PRECISIONS.get(str(precision), str(precision))

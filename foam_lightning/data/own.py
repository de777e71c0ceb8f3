"""A LightningDataModule of somebody's own, created from its import path."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule

from foam_lightning.data.notices import print_once
from foam_lightning.data.parts import PartsLoader
from foam_lightning.distributed.topology import is_first_process
from foam_lightning.errors import ConfigError, DataError, first_line
from foam_lightning.settings import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Parameters of its constructor that get the value of the setting, unless init_args has another.
_OFFERED = ("batch_size", "sequence_length", "vocab_size")
# Settings of text that configurations for other data may well have.
_UNUSED = ("packing", "num_workers", "validation_sequences", "text_column")
_DEFAULTS = {field.name: field.default for field in fields(DataSettings)}
# Hooks that Lightning calls between loader and model, which never see a whole batch here.
_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def source_file(class_path: str) -> str | None:
    """Return the file that defines a class, without running it; None if it is not found.

    Args:
        class_path: The import path. The packages that contain its module are imported.
    """
    try:
        spec = find_spec(class_path.rpartition(".")[0])
    except Exception:  # of a package that fails to import, or of a path that is none
        return None
    return spec.origin if spec else None


class OwnData(LightningDataModule):
    """The data module that `data.class_path` names, with what this framework expects of one.

    A batch has "input_ids" and "labels", both int64 (micro_batch_size, sequence_length), as those
    of `TextData`.

    Args:
        settings: Name the class and its arguments, and have the sizes of a batch.
        seed: Seeds torch, NumPy and Python anew for each epoch, wherever a loader is read. So the
            order follows from it, in each short run and after a resume.

    Raises:
        ConfigError: The class cannot be imported or created, or does what is not supported.
    """

    def __init__(self, settings: DataSettings, *, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        self.seed = seed
        self._name = f"data.class_path {settings.class_path}"
        self._module = self._create()
        unused = [one for one in _UNUSED if getattr(settings, one) != _DEFAULTS[one]]
        if unused:
            names = ", ".join(f"data.{one}" for one in unused)
            print_once(f"{self._name} has loaders of its own; {names} change nothing")
        self._is_prepared = self._is_set_up = False
        self._firsts: dict[str, int] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def micro_batch_size(self) -> int:
        """Rows per forward pass on one device."""
        return self.settings.micro_batch_size or self.settings.batch_size

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """Its attribute `tokenizer`, or else that of the settings; None if there is neither."""
        self.setup()
        return self._tokenizer

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has of the data, with the state of the module itself."""
        return {**self._state, "own": self._module.state_dict()}

    @cached_property
    def _state(self) -> dict[str, Any]:
        from foam_lightning.data.saved import state_to_save

        return state_to_save(self._tokenizer, self.settings)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the module its state back, if the checkpoint is of the same class."""
        saved = state.get("settings", {})
        if saved.get("class_path") == self.settings.class_path:
            self._module.load_state_dict(state.get("own", {}))

    def prepare_data(self) -> None:
        """Let the module prepare its data, in one process of each machine."""
        if not self._is_prepared:
            with self._errors("prepare_data() fails"):
                self._module.prepare_data()
        self._is_prepared = True

    def setup(self, stage: str | None = None) -> None:
        """Set up the module for training, and check its first batches and their order.

        Args:
            stage: None before there is a trainer. Then only the first process sets up, since the
                others have to wait until it has prepared the data, which Lightning does.

        Raises:
            ConfigError: A loader is not one that a run could resume.
            DataError: The module fails, or its first batches are not what the settings say.
        """
        if self._is_set_up or (stage is None and not is_first_process()):
            return
        if is_first_process():
            self.prepare_data()
        with self._errors("setup('fit') fails"):
            self._module.setup("fit")
        self._tokenizer = self._find_tokenizer()
        if self._tokenizer is None:
            print_once(
                f"{self._name} has no attribute `tokenizer`, and data.tokenizer names none; the "
                "exported model comes without one, and generate cannot use it"
            )
        self._is_set_up = True
        for make_loader in (self.train_dataloader, self.val_dataloader):
            for _ in range(2):  # a second one has to begin with the same batch
                with self._errors(f"{make_loader.__name__}() fails"):
                    next(iter(make_loader()))

    def steps_per_epoch(self) -> int:
        """Return how many optimizer steps read every training row once."""
        self.setup()
        return len(self.train_dataloader()) * self.micro_batch_size // self.settings.batch_size

    def train_dataloader(self) -> PartsLoader:
        """Return a loader of the micro-batches of this rank, which resumes exactly."""
        return self._parts("train_dataloader", is_training=True)

    def val_dataloader(self) -> PartsLoader:
        """Return a loader of the micro-batches of this rank, always in the same order."""
        return self._parts("val_dataloader", is_training=False)

    def _parts(self, name: str, *, is_training: bool) -> PartsLoader:
        with self._errors(f"{name}() fails"):
            loader = getattr(self._module, name)()
        trainer = self.trainer
        return PartsLoader(
            loader,
            f"{self._name}: {name}()",
            self.settings,
            seed=self.seed,
            ranks=(trainer.world_size, trainer.global_rank) if trainer else (1, 0),
            is_training=is_training,
            check_first=lambda digest: self._firsts.setdefault(name, digest) == digest,
        )

    def _create(self) -> LightningDataModule:
        module, _, name = str(self.settings.class_path).rpartition(".")
        try:
            found = getattr(import_module(module), name)
        except Exception as error:  # whatever its code raises
            raise ConfigError(
                f"{self._name} cannot be imported: {first_line(error)}; its file belongs into the "
                "working directory or a folder of PYTHONPATH"
            ) from error
        if not (isinstance(found, type) and issubclass(found, LightningDataModule)):
            raise ConfigError(f"{self._name} is no LightningDataModule of lightning.pytorch")
        changed = [one for one in _HOOKS if getattr(found, one) is not _default(one)]
        if changed:
            raise ConfigError(
                f"{self._name} has {changed[0]}(), which would see parts of its batches; let its "
                "loaders do that"
            )
        offered = {name: getattr(self.settings, name) for name in _OFFERED} | {"seed": self.seed}
        taken = inspect.signature(found).parameters.keys()
        arguments = {name: value for name, value in offered.items() if name in taken}
        try:
            return found(**arguments | (self.settings.init_args or {}))
        except Exception as error:
            raise ConfigError(f"{self._name} cannot be created: {first_line(error)}") from error

    def _find_tokenizer(self) -> "PreTrainedTokenizerBase | None":
        from transformers import PreTrainedTokenizerBase

        from foam_lightning.data.tokenizer import count_other_ids, load_tokenizer

        named, own = self.settings.tokenizer, getattr(self._module, "tokenizer", None)
        loaded = None if named is None else load_tokenizer(named)
        if own is None:
            return loaded
        if not isinstance(own, PreTrainedTokenizerBase):
            raise ConfigError(
                f"{self._name} has a {type(own).__name__} as `tokenizer`; only one of transformers "
                "can be saved with a run"
            )
        if loaded is not None and (num_other := count_other_ids(loaded, own)):
            raise DataError(
                f"{self._name} has a tokenizer that gives {num_other} of {len(loaded)} tokens "
                f"another id than {named}, with which the embeddings were trained; use that one"
            )
        return own

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn an error of the module's code into one line."""
        try:
            yield
        except (ConfigError, DataError):
            raise
        except Exception as error:
            text = first_line(error)
            name = "" if text.startswith(type(error).__name__) else f"{type(error).__name__}: "
            raise DataError(f"{self._name}: {what}: {name}{text}; --debug shows where") from error


def _default(hook: str) -> Any:
    return getattr(LightningDataModule, hook)

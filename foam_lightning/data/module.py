"""The Lightning data module: text as batches of token rows."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from foam_lightning.data.cache import cache_folder
from foam_lightning.errors import ConfigError
from foam_lightning.settings import DataSettings
from foam_lightning.signals import survive_signals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from foam_lightning.data.chat import ChatText
    from foam_lightning.data.loader import RowLoader, StreamLoader
    from foam_lightning.data.mixture import SourceSettings
    from foam_lightning.data.packing import Row
    from foam_lightning.data.rows import PackedText, StreamedText


class TextData(LightningDataModule):
    """Read text, tokenise it, and serve it as batches.

    A batch has "input_ids" and "labels", both int64 (micro_batch_size, sequence_length). Labels are
    the same tokens, not shifted, and -100 for padding and, in a chat, outside of responses.

    Prepared data is stored in the cache folder, so a second run starts at once.

    Args:
        settings: Settings of the text and its batches.
        seed: Seeds the order of the training rows.
        arguments: Arguments of `DataSettings`, instead of `settings`.

    Attributes:
        stream_rows: Rows per epoch when streaming; by default what trainer.max_steps needs.

    Raises:
        ConfigError: Two settings contradict each other.
    """

    def __init__(
        self, settings: DataSettings | None = None, *, seed: int = 0, **arguments: Any
    ) -> None:
        super().__init__()
        self.settings = settings or DataSettings(**arguments)
        self.seed = seed
        self.stream_rows: int | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._text: PackedText | StreamedText | ChatText
        self._check()
        self._sources = self._read_sources()

    @property
    def micro_batch_size(self) -> int:
        """Rows per forward pass on one device."""
        return self.settings.micro_batch_size or self.settings.batch_size

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The trained or loaded tokenizer; prepares the data first if needed."""
        self.setup()
        assert self._tokenizer is not None
        return self._tokenizer

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has of the data; Lightning calls it for each checkpoint."""
        from foam_lightning.data.saved import state_to_save

        # Not kept, because its tensors would count as memory of the run.
        return state_to_save(self.tokenizer, self.settings)

    def prepare_data(self) -> None:
        """Fill the cache in one process, before the others open it."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Tokenize and pack the text, or open the cache of an earlier run.

        Args:
            stage: Ignored: training and validation text are prepared together.

        Raises:
            DataError: The text or the tokenizer cannot be read, or there is too little text.
        """
        if self._tokenizer is not None:
            return
        from foam_lightning.data.packing import collate
        from foam_lightning.data.tokenizer import pad_id

        settings = self.settings
        # Unless it is set, tokenizers prints a warning whenever a loader forks a worker.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        cache = cache_folder(settings.cache_dir)
        self._text, tokenizer = self._open_chat(cache) if settings.chat else self._open_text(cache)
        self._collate = partial(
            collate,
            sequence_length=settings.sequence_length,
            pad=pad_id(tokenizer, settings.vocab_size),
        )
        self._tokenizer = tokenizer

    def _open_text(
        self, cache: Path
    ) -> "tuple[PackedText | StreamedText, PreTrainedTokenizerBase]":
        from foam_lightning.data.mixture import interleave
        from foam_lightning.data.rows import PackedText, StreamedText, Text
        from foam_lightning.data.sources import open_source
        from foam_lightning.data.tokenizer import build_tokenizer

        settings = self.settings
        texts = [open_source(s, streaming=settings.streaming, cache=cache) for s in self._sources]
        train = [text.train for text in texts]
        tokenizer = build_tokenizer(
            settings.tokenizer,
            vocab_size=settings.vocab_size,
            documents=train[0] if len(train) == 1 else interleave(train),
            cache=cache,
        )
        text = Text(
            sources=self._sources,
            texts=texts,
            tokenizer=tokenizer,
            sequence_length=settings.sequence_length,
            packing=settings.packing,
            validation_sequences=settings.validation_sequences,
        )
        if settings.streaming:
            return StreamedText(text), tokenizer
        return PackedText(text, batch_size=settings.batch_size, cache=cache), tokenizer

    def _open_chat(self, cache: Path) -> "tuple[ChatText, PreTrainedTokenizerBase]":
        from foam_lightning.data.chat import ChatText
        from foam_lightning.data.tokenizer import build_tokenizer

        settings = self.settings
        assert settings.files is not None
        tokenizer = build_tokenizer(
            settings.tokenizer, vocab_size=settings.vocab_size, documents=iter(()), cache=cache
        )
        text = ChatText(
            settings.files,
            settings.validation_files,
            tokenizer,
            sequence_length=settings.sequence_length,
            batch_size=settings.batch_size,
            validation_sequences=settings.validation_sequences,
            cache=cache,
        )
        return text, tokenizer

    def steps_per_epoch(self) -> int | None:
        """Return how many optimizer steps read every training row once; None for a stream.

        Raises:
            DataError: As for `setup`.
        """
        if self.settings.streaming:
            return None
        self.setup()
        return len(self.train_dataloader()) * self.micro_batch_size // self.settings.batch_size

    def train_dataloader(self) -> "RowLoader | StreamLoader":
        """Return a loader of the training rows, whose order resumes exactly within an epoch."""
        from foam_lightning.data.loader import resumable_loader
        from foam_lightning.data.rows import StreamedText

        text, (world, rank) = self._text, self._ranks()
        if isinstance(text, StreamedText):
            return self._stream_loader(text, world, rank)
        return resumable_loader(
            text.train,
            self._collate,
            batch_size=self.micro_batch_size,
            num_workers=self.settings.num_workers,
            sampler=text.sampler(seed=self.seed, world=world, rank=rank),
        )

    def val_dataloader(self) -> "DataLoader[Row]":
        """Return a loader of this rank's validation rows, always in the same order."""
        from foam_lightning.data.loader import RankRows, worker_timeout

        world, rank = self._ranks()
        return DataLoader(
            RankRows(self._text.validation, world, rank),
            batch_size=self.micro_batch_size,
            num_workers=self.settings.num_workers,
            collate_fn=self._collate,
            worker_init_fn=survive_signals,
            timeout=worker_timeout(self.settings.num_workers),
            generator=torch.Generator(),  # as in `data.loader`
        )

    def _ranks(self) -> tuple[int, int]:
        """Return the number of ranks and this rank."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _check(self) -> None:
        settings = self.settings
        if settings.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"data.micro_batch_size {self.micro_batch_size} does not divide data.batch_size "
                f"{settings.batch_size}; choose a divisor"
            )
        if settings.chat and (
            settings.files is None or settings.streaming or settings.tokenizer is None
        ):
            raise ConfigError(
                "data.chat needs data.files and a tokenizer, from model.pretrained or "
                "data.tokenizer, and does not support data.streaming"
            )
        own = ("files", "validation_files", "dataset", "dataset_config")
        doubled = [name for name in own if getattr(self.settings, name) is not None]
        if settings.sources is not None and doubled:
            raise ConfigError(
                f"data.sources and data.{doubled[0]} are both set; move it into data.sources"
            )
        given = (settings.files, settings.dataset, settings.sources)
        if settings.streaming and all(source is None for source in given):
            raise ConfigError("data.streaming has nothing to read; set data.dataset or data.files")

    def _read_sources(self) -> "list[SourceSettings]":
        from foam_lightning.data.mixture import SourceSettings, read_sources

        settings = self.settings
        if settings.sources is not None:
            return read_sources(settings.sources)
        source = SourceSettings(
            files=settings.files,
            validation_files=settings.validation_files,
            text_column=settings.text_column,
            dataset=settings.dataset,
            dataset_config=settings.dataset_config,
        )
        source.check("data")
        return [source]

    def _stream_loader(self, text: "StreamedText", world: int, rank: int) -> "StreamLoader":
        from foam_lightning.data.loader import StreamLoader

        num_rows = self.stream_rows
        if num_rows is None:
            max_steps = self.trainer.max_steps if self.trainer else -1
            if max_steps < 1:
                raise ConfigError("a stream has no end; set trainer.max_steps")
            num_rows = max_steps * self.settings.batch_size
        return StreamLoader(
            text.rows(seed=self.seed, world=world, rank=rank),
            self._collate,
            batch_size=self.micro_batch_size,
            num_rows=num_rows // world,
            num_workers=self.settings.num_workers,
        )

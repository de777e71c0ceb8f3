"""The Lightning data module: text from anywhere, as batches of token rows."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from foam_lightning.data.cache import cache_folder
from foam_lightning.errors import ConfigError
from foam_lightning.signals import survive_signals
from foam_lightning.validation import DATA, check_ranges

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from foam_lightning.data.chat import ChatText
    from foam_lightning.data.loader import RowLoader, StreamLoader
    from foam_lightning.data.mixture import Source
    from foam_lightning.data.packing import Row
    from foam_lightning.data.rows import PackedText, StreamedText


class TextData(LightningDataModule):
    """Read text, tokenise it, and serve it as batches.

    A batch holds "input_ids" and "labels", both int64 (micro_batch_size, sequence_length); labels
    are the same tokens, not shifted, and -100 where there is only padding, or in a conversation
    where the assistant does not speak.

    Without `files` and `dataset` the text is the source of Python's own library, which is on this
    machine already. What is prepared is kept in the cache folder, so a second run starts at once.

    Args:
        files: Training text: .txt (one document each), .jsonl or .parquet (one per row).
        validation_files: Text to evaluate on; by default 5 percent of `files` is held out.
        text_column: The column of the text in .jsonl, .parquet and `dataset`.
        dataset: Name of a dataset on the Hugging Face Hub with train and validation splits.
        dataset_config: Its configuration, such as "en", where it has several.
        sources: Several sources instead of one: for each its `weight`, its part of the training
            rows relative to the others, and `files` or `dataset` with the settings that belong to
            them. Validation rows are in the same proportion.
        streaming: Read text while training: `dataset` over the network, rather than download it
            first; `files` without a cache of them on disk.
        chat: The `files` are conversations, .jsonl as `ChatText` says, and responses alone are
            learned. Each is a row, padded, whatever `packing` says.
        tokenizer: A local folder or a name on the Hub; by default that of model.pretrained, or
            else one is trained on the text.
        vocab_size: The model's vocabulary: how many tokens to train, and the limit of `tokenizer`.
        sequence_length: Tokens in a row.
        packing: Let documents follow each other so that every row is full; otherwise each
            document is a row of its own, cut off or padded (as in the FOAM paper).
        batch_size: Rows in an optimizer step, over all devices and accumulated micro-batches.
        micro_batch_size: Rows in one forward pass on one device; by default `batch_size`. It
            changes memory and speed, never which rows a step sees.
        validation_sequences: Rows to evaluate on, always the same; fewer if there are fewer.
        num_workers: Processes that load batches; 0 loads them in the training process. Streams
            come in another order with 2 or more.
        seed: Decides the order of the training rows.
        cache_dir: Where prepared data is kept; by default foam-lightning in $XDG_CACHE_HOME or
            ~/.cache.

    Attributes:
        stream_rows: Rows in an epoch when streaming; None takes what trainer.max_steps needs.

    Raises:
        ConfigError: Settings contradict each other.
    """

    def __init__(
        self,
        files: list[str] | None = None,
        validation_files: list[str] | None = None,
        text_column: str = "text",
        dataset: str | None = None,
        dataset_config: str | None = None,
        sources: list[dict[str, Any]] | None = None,
        streaming: bool = False,
        chat: bool = False,
        tokenizer: str | None = None,
        vocab_size: int = 1024,
        sequence_length: int = 64,
        packing: bool = True,
        batch_size: int = 8,
        micro_batch_size: int | None = None,
        validation_sequences: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.files = files
        self.validation_files = validation_files
        self.text_column = text_column
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.sources = sources
        self.streaming = streaming
        self.chat = chat
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.packing = packing
        self.batch_size = batch_size
        self.micro_batch_size = batch_size if micro_batch_size is None else micro_batch_size
        self.validation_sequences = validation_sequences
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dir = cache_dir
        self.stream_rows: int | None = None
        self._tokenizer_name = tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._text: PackedText | StreamedText | ChatText
        self._check()
        self._sources = self._read_sources()

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The trained or loaded tokenizer; prepares the data if that has not happened yet."""
        self.setup()
        assert self._tokenizer is not None
        return self._tokenizer

    def prepare_data(self) -> None:
        """Fill the cache in one process, before the others read it."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenise and pack, or open what an earlier run has left in the cache.

        Args:
            stage: Not looked at: training and validation text are prepared together.

        Raises:
            DataError: The text or the tokenizer cannot be read, or the text is not enough.
        """
        if self._tokenizer is not None:
            return
        from foam_lightning.data.packing import collate
        from foam_lightning.data.tokenizer import pad_id

        # Said outright, or tokenizers prints a warning whenever a loader forks a worker.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        cache = cache_folder(self.cache_dir)
        self._text, tokenizer = self._open_chat(cache) if self.chat else self._open_text(cache)
        self._collate = partial(
            collate, sequence_length=self.sequence_length, pad=pad_id(tokenizer, self.vocab_size)
        )
        self._tokenizer = tokenizer

    def _open_text(
        self, cache: Path
    ) -> "tuple[PackedText | StreamedText, PreTrainedTokenizerBase]":
        from foam_lightning.data.mixture import in_turn
        from foam_lightning.data.rows import PackedText, StreamedText, Text
        from foam_lightning.data.sources import open_source
        from foam_lightning.data.tokenizer import build_tokenizer

        texts = [
            open_source(source, streaming=self.streaming, cache=cache) for source in self._sources
        ]
        train = [text.train for text in texts]
        tokenizer = build_tokenizer(
            self._tokenizer_name,
            vocab_size=self.vocab_size,
            documents=train[0] if len(train) == 1 else in_turn(train),
            cache=cache,
        )
        text = Text(
            sources=self._sources,
            texts=texts,
            tokenizer=tokenizer,
            sequence_length=self.sequence_length,
            packing=self.packing,
            validation_sequences=self.validation_sequences,
        )
        if self.streaming:
            return StreamedText(text), tokenizer
        return PackedText(text, batch_size=self.batch_size, cache=cache), tokenizer

    def _open_chat(self, cache: Path) -> "tuple[ChatText, PreTrainedTokenizerBase]":
        from foam_lightning.data.chat import ChatText
        from foam_lightning.data.tokenizer import build_tokenizer

        assert self.files is not None
        tokenizer = build_tokenizer(
            self._tokenizer_name, vocab_size=self.vocab_size, documents=iter(()), cache=cache
        )
        text = ChatText(
            self.files,
            self.validation_files,
            tokenizer,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            validation_sequences=self.validation_sequences,
            cache=cache,
        )
        return text, tokenizer

    def train_dataloader(self) -> "RowLoader | StreamLoader":
        """Serve the training rows in an order that resumes exactly, in or between epochs."""
        from foam_lightning.data.loader import resumable_loader
        from foam_lightning.data.rows import StreamedText

        text, (world, rank) = self._text, self._ranks()
        if isinstance(text, StreamedText):
            return self._stream_loader(text, world, rank)
        return resumable_loader(
            text.train,
            self._collate,
            batch_size=self.micro_batch_size,
            num_workers=self.num_workers,
            sampler=text.sampler(seed=self.seed, world=world, rank=rank),
        )

    def val_dataloader(self) -> "DataLoader[Row]":
        """Serve the same validation rows in the same order, every time; to each rank its share."""
        from foam_lightning.data.loader import ShareOfRows

        world, rank = self._ranks()
        return DataLoader(
            ShareOfRows(self._text.validation, world, rank),
            batch_size=self.micro_batch_size,
            num_workers=self.num_workers,
            collate_fn=self._collate,
            worker_init_fn=survive_signals,
            generator=torch.Generator(),  # as in `data.loader`
        )

    def _ranks(self) -> tuple[int, int]:
        """Tell how many ranks share the rows, and which one this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _check(self) -> None:
        check_ranges("data.", vars(self), DATA)
        if self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"data.micro_batch_size {self.micro_batch_size} does not divide data.batch_size "
                f"{self.batch_size}; choose a divisor"
            )
        if self.chat and (self.files is None or self.streaming or self._tokenizer_name is None):
            raise ConfigError(
                "data.chat needs data.files and a tokenizer, from model.pretrained or "
                "data.tokenizer, and does not go with data.streaming"
            )
        own = ("files", "validation_files", "dataset", "dataset_config")
        doubled = [name for name in own if getattr(self, name) is not None]
        if self.sources is not None and doubled:
            raise ConfigError(
                f"data.sources and data.{doubled[0]} are both set; name it within data.sources"
            )
        if self.streaming and self.files is None and self.dataset is None and self.sources is None:
            raise ConfigError("data.streaming has nothing to read; set data.dataset or data.files")

    def _read_sources(self) -> "list[Source]":
        from foam_lightning.data.mixture import Source, read_sources

        if self.sources is not None:
            return read_sources(self.sources)
        source = Source(
            files=self.files,
            validation_files=self.validation_files,
            text_column=self.text_column,
            dataset=self.dataset,
            dataset_config=self.dataset_config,
        )
        source.check("data")
        return [source]

    def _stream_loader(self, text: "StreamedText", world: int, rank: int) -> "StreamLoader":
        from foam_lightning.data.loader import StreamLoader

        num_rows = self.stream_rows
        if num_rows is None:
            max_steps = self.trainer.max_steps if self.trainer else -1
            if max_steps < 1:
                raise ConfigError("a stream has no end: set trainer.max_steps with data.streaming")
            num_rows = max_steps * self.batch_size
        return StreamLoader(
            text.rows(seed=self.seed, world=world, rank=rank),
            self._collate,
            batch_size=self.micro_batch_size,
            num_rows=num_rows // world,
            num_workers=self.num_workers,
        )

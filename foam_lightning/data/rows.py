"""Rows of tokens from text: packed in files or streamed, from one source or several."""

from collections.abc import Iterator, Sequence, Sized
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from foam_lightning.data import rng
from foam_lightning.data.files import Document, list_shards
from foam_lightning.data.loader import EpochSampler
from foam_lightning.data.mixture import MixtureSampler, SourceSettings, normalized_weights
from foam_lightning.data.packing import (
    evenly_spaced,
    packed_dataset,
    packed_rows,
    rows_in_whole_batches,
)
from foam_lightning.data.sources import TextSource
from foam_lightning.data.streaming import StreamedRows, StreamedSource
from foam_lightning.data.table import Table
from foam_lightning.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Text(NamedTuple):
    """Opened text, and how to turn it into rows.

    Attributes:
        sources: Settings of each source.
        texts: Documents of each source.
        tokenizer: Its end-of-text token follows each document.
        sequence_length: Tokens in a full row.
        packing: Fill every row; otherwise each document is a row of its own.
        validation_sequences: Number of validation rows, at most.
    """

    sources: Sequence[SourceSettings]
    texts: Sequence[TextSource]
    tokenizer: "PreTrainedTokenizerBase"
    sequence_length: int
    packing: bool
    validation_sequences: int


class PackedText:
    """Rows of tokens in memory-mapped files.

    Args:
        text: The text.
        batch_size: Rows in an optimizer step; an epoch is a whole number of steps.
        cache: Folder in which the rows are cached.

    Attributes:
        train: All training rows, one source after the other.
        validation: Rows of every source in proportion to the weights, always the same.

    Raises:
        DataError: A source has less text than one row, or all have less than one batch.
    """

    def __init__(self, text: Text, *, batch_size: int, cache: Path) -> None:
        train, validation = (
            [_packed(text, one, split, cache) for one in text.texts]
            for split in ("train", "validation")
        )
        _require_rows(text, "validation", validation)
        if len(train) > 1:
            _require_rows(text, "training", train)
        self._text = text
        self._batch_size = batch_size
        self._sizes = [len(rows) for rows in train]
        total = rows_in_whole_batches(sum(self._sizes), batch_size, text.sequence_length)
        self.train = Table.concatenate(train) if len(train) > 1 else train[0].select(range(total))
        self.validation = Table.concatenate(
            [
                rows.select(evenly_spaced(count, len(rows)))
                for rows, count in zip(
                    validation, _validation_counts(text, validation), strict=True
                )
            ]
        )

    def sampler(self, *, seed: int, world: int, rank: int) -> EpochSampler:
        """Create the sampler of the training rows.

        Args:
            seed: Determines the order, together with the epoch.
            world: Number of ranks.
            rank: This rank.
        """
        if len(self._sizes) == 1:
            return EpochSampler(self.train, world, rank, seed=seed, drop_last=True)
        return MixtureSampler(
            self._sizes,
            normalized_weights(self._text.sources),
            batch_size=self._batch_size,
            world=world,
            rank=rank,
            seed=seed,
        )


class StreamedText:
    """Rows of tokens from streams.

    Args:
        text: The text.

    Attributes:
        validation: The first rows of every source in proportion to the weights.

    Raises:
        DataError: A source has less validation text than one row.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._shards = [
            list_shards(one.train, source.name)
            for one, source in zip(text.texts, text.sources, strict=True)
        ]
        streams = (
            packed_rows(
                _read_documents(one.validation, source.name),
                text.tokenizer,
                sequence_length=text.sequence_length,
                packing=text.packing,
            )
            for one, source in zip(text.texts, text.sources, strict=True)
        )
        first = [list(islice(rows, text.validation_sequences)) for rows in streams]
        _require_rows(text, "validation", first)
        counts = _validation_counts(text, first)
        chosen = (rows[:count] for rows, count in zip(first, counts, strict=True))
        self.validation = list(chain.from_iterable(chosen))

    def rows(self, *, seed: int, world: int, rank: int) -> StreamedRows:
        """Open the stream of training rows.

        Args:
            seed: Determines the order.
            world: Number of ranks.
            rank: This rank.
        """
        sources = [
            StreamedSource(
                shards,
                self._text.tokenizer,
                sequence_length=self._text.sequence_length,
                packing=self._text.packing,
                seed=rng.random_integer(seed, index),
            )
            for index, shards in enumerate(self._shards)
        ]
        weights = normalized_weights(self._text.sources)
        return StreamedRows(sources, weights, seed=seed, world=world, rank=rank)


def _read_documents(documents: Any, name: str) -> Iterator[dict[str, Document]]:
    for shard in list_shards(documents, f"{name}, validation"):
        for document in shard.read(None):
            yield {"text": document}


def _packed(text: Text, one: TextSource, split: str, cache: Path) -> "Table":
    return packed_dataset(
        getattr(one, split),
        tokenizer=text.tokenizer,
        fingerprint=f"{one.fingerprint}-{split}",
        sequence_length=text.sequence_length,
        packing=text.packing,
        cache=cache,
    )


def _require_rows(text: Text, split: str, rows: Sequence[Sized]) -> None:
    for own, source in zip(rows, text.sources, strict=True):
        if len(own) == 0:
            raise DataError(
                f"the {split} text of {source.name_of(split)} is shorter than one sequence of "
                f"{text.sequence_length} tokens; add text, or lower data.sequence_length"
            )


def _validation_counts(text: Text, rows: Sequence[Sized]) -> list[int]:
    """Count validation rows per source, in proportion to the weights; at least one each.

    The source with the fewest rows for its weight limits the total.
    """
    parts = normalized_weights(text.sources)
    enough = (int(len(own) / share) for own, share in zip(rows, parts, strict=True))
    total = min(text.validation_sequences, *enough)
    counts = rng.apportion(total, parts)
    return [min(max(1, count), len(own)) for count, own in zip(counts, rows, strict=True)]

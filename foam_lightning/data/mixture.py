"""Several weighted sources: what the settings say of each, and how their rows are mixed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foam_lightning.data import rng as draw
from foam_lightning.data.loader import EpochSampler
from foam_lightning.data.packing import even_subset
from foam_lightning.errors import ConfigError
from foam_lightning.validation import POSITIVE

if TYPE_CHECKING:
    from datasets import Dataset

_SAMPLED_DOCUMENTS = 2**15


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where some of the text comes from, and how much of the training rows it gives.

    Args:
        files: Training text: .txt (one document each), .jsonl or .parquet (one per row).
        validation_files: Text to evaluate on; by default 5 percent of `files` is held out.
        text_column: The column of the text in .jsonl, .parquet and `dataset`.
        dataset: Name of a dataset on the Hugging Face Hub with train and validation splits.
        dataset_config: Its configuration, such as "en", where it has several.
        weight: Its part of the rows, relative to those of the other sources.
    """

    files: list[str] | None = None
    validation_files: list[str] | None = None
    text_column: str = "text"
    dataset: str | None = None
    dataset_config: str | None = None
    weight: float = 1.0

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.dataset or (self.files or ["the default corpus"])[0]

    def check(self, place: str) -> None:
        """Refuse settings that contradict each other.

        Args:
            place: How the settings begin, such as "data" or "data.sources[1]".

        Raises:
            ConfigError: They do.
        """
        if self.files == []:
            raise ConfigError(f"{place}.files names no file; name one, or leave the setting out")
        if self.files is not None and self.dataset is not None:
            raise ConfigError(f"{place}.files and {place}.dataset are both set; choose one")
        if self.validation_files is not None and self.files is None:
            raise ConfigError(f"{place}.validation_files needs {place}.files, the text to train on")


def read_sources(settings: Sequence[Mapping[str, Any]]) -> list[Source]:
    """Read the sources of the settings.

    Raises:
        ConfigError: There is none, or one has an unknown key, no weight, a weight that is not
            above 0, or neither files nor a dataset.
    """
    if not settings:
        raise ConfigError("data.sources names no source; name one, or leave the setting out")
    return [_read(one, f"data.sources[{index}]") for index, one in enumerate(settings)]


def shares(sources: Sequence[Source]) -> list[float]:
    """Scale the weights so that they add up to 1."""
    total = math.fsum(source.weight for source in sources)
    return [source.weight / total for source in sources]


def in_turn(datasets: Sequence[Any]) -> Iterator[dict[str, str]]:
    """Read documents of every source in turn, from which a tokenizer is trained.

    Those of a dataset on disk are spread over all of it; of a stream they are the first.
    """
    iterators = [_spread(dataset) for dataset in datasets]
    while iterators:
        for iterator in list(iterators):
            document = next(iterator, None)
            if document is None:
                iterators.remove(iterator)
            else:
                yield document


class MixtureSampler(EpochSampler):
    """Mix the rows of several sources, each as often as its share says, in every epoch exactly.

    An epoch is as many rows as there are. A source that has fewer rows than its share begins
    again, in another order; one that has more goes on with the others in the next epoch. All this
    follows from seed and epoch, so it resumes exactly.

    Args:
        sizes: Rows of every source; they lie one source after the other.
        shares: They add up to 1.
        batch_size: Rows in an optimizer step; an epoch is whole steps.
        world: Ranks.
        rank: Whose rows these are.
        seed: Decides the order.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: Sequence[float],
        *,
        batch_size: int,
        world: int,
        rank: int,
        seed: int,
    ) -> None:
        total = sum(sizes) // batch_size * batch_size
        super().__init__(range(total), world, rank, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.sizes = sizes
        self.counts = draw.apportion(total, shares)

    def _order(self) -> Tensor:
        firsts = np.cumsum([0, *self.sizes[:-1]])
        parts = [
            first + self._of_source(index)
            for index, first in enumerate(firsts)
            if self.counts[index]
        ]
        return torch.from_numpy(np.concatenate(parts))[super()._order()]

    def _of_source(self, index: int) -> NDArray[np.int64]:
        """Take the rows of one source in this epoch: a stretch of its endless shuffles."""
        size, count = self.sizes[index], self.counts[index]
        start = self.epoch * count
        passes = range(start // size, -(-(start + count) // size))
        rows = np.concatenate([draw.order(size, self.seed, index, number) for number in passes])
        offset = start - passes[0] * size
        return rows[offset : offset + count]


def _read(settings: Mapping[str, Any], place: str) -> Source:
    known = [field.name for field in fields(Source)]
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise ConfigError(f"{place} has no setting {unknown[0]!r}; there are {', '.join(known)}")
    weight = settings.get("weight")
    if not _is_number(weight) or not POSITIVE.holds(weight):
        raise ConfigError(f"{place}.weight must be a number above 0, got {weight!r}; give it one")
    for key in ("files", "validation_files"):
        paths = settings.get(key)
        if paths is not None and not _are_texts(paths):
            raise ConfigError(f"{place}.{key} must be a list of paths, got {paths!r}")
    for key in ("text_column", "dataset", "dataset_config"):
        if not isinstance(settings.get(key, ""), str | None):
            raise ConfigError(f"{place}.{key} must be a text, got {settings[key]!r}")
    source = Source(**settings)
    source.check(place)
    if source.files is None and source.dataset is None:
        raise ConfigError(f"{place} names neither files nor a dataset; give it one of them")
    return source


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _spread(documents: "Dataset") -> Iterator[dict[str, str]]:
    from datasets import Dataset

    if not isinstance(documents, Dataset):
        return islice(iter(documents), _SAMPLED_DOCUMENTS)
    count = min(len(documents), _SAMPLED_DOCUMENTS)
    return (documents[index] for index in even_subset(count, len(documents)))

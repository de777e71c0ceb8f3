"""Several weighted sources of text: their settings, and the order in which rows are mixed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foam_lightning.data import rng
from foam_lightning.data.loader import EpochSampler
from foam_lightning.data.packing import evenly_spaced
from foam_lightning.data.records import name_files
from foam_lightning.errors import ConfigError
from foam_lightning.validation import POSITIVE

_MAX_DOCUMENTS = 2**15


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """One source of text, and its weight in the mixture.

    Args:
        files: Training text: files, folders and patterns; see `list_files`.
        validation_files: Validation text; by default 5 percent of `files` is held out.
        text_column: The column of the text in files of records and in `dataset`.
        dataset: Name of a dataset on the Hugging Face Hub with train and validation splits.
        dataset_config: Its configuration, such as "en", if it has several.
        weight: Share of the training rows, relative to the other sources.
    """

    files: list[str] | str | None = None
    validation_files: list[str] | str | None = None
    text_column: str = "text"
    dataset: str | None = None
    dataset_config: str | None = None
    weight: float = 1.0

    @property
    def name(self) -> str:
        """Its name in errors."""
        return self.dataset or (name_files(self.files) if self.files else "the default corpus")

    def name_of(self, split: str) -> str:
        """Return its name in errors about the split "training" or "validation"."""
        own = self.validation_files if split == "validation" else None
        return name_files(own) if own else self.name

    def check(self, prefix: str) -> None:
        """Check that the settings do not contradict each other.

        Args:
            prefix: Of the settings in errors, such as "data" or "data.sources[1]".

        Raises:
            ConfigError: They contradict each other.
        """
        if self.files in ([], ""):
            raise ConfigError(f"{prefix}.files is empty; name a file, or remove the setting")
        if self.files is not None and self.dataset is not None:
            raise ConfigError(f"{prefix}.files and {prefix}.dataset are both set; remove one")
        if self.validation_files is not None and self.files is None:
            raise ConfigError(f"{prefix}.validation_files is set without {prefix}.files; set both")


def read_sources(settings: Sequence[Mapping[str, Any]]) -> list[SourceSettings]:
    """Read the setting `data.sources`.

    Raises:
        ConfigError: It is empty, or a source has an unknown key, no weight, a weight that is not
            above 0, or neither files nor a dataset.
    """
    if not settings:
        raise ConfigError("data.sources is empty; name a source, or remove the setting")
    return [_parse_source(one, f"data.sources[{index}]") for index, one in enumerate(settings)]


def normalized_weights(sources: Sequence[SourceSettings]) -> list[float]:
    """Return the weights, scaled to add up to 1."""
    total = math.fsum(source.weight for source in sources)
    return [source.weight / total for source in sources]


def interleave(datasets: Sequence[Any]) -> Iterator[dict[str, str]]:
    """Yield documents of the sources in turn, to train a tokenizer.

    Documents of a dataset on disk are evenly spaced; of a stream, the first ones.
    """
    iterators = [_sample_documents(dataset) for dataset in datasets]
    while iterators:
        for iterator in list(iterators):
            document = next(iterator, None)
            if document is None:
                iterators.remove(iterator)
            else:
                yield document


class MixtureSampler(EpochSampler):
    """Mixes the rows of several sources in exact proportion to their shares in every epoch.

    An epoch has as many rows as all sources together. A source with fewer rows than its share
    repeats, in another order; one with more continues in the next epoch. The order depends only on
    seed and epoch, so it resumes exactly.

    Args:
        sizes: Number of rows of every source; the rows of a source are adjacent.
        shares: They add up to 1.
        batch_size: Rows in an optimizer step; an epoch is a whole number of steps.
        world: Number of ranks.
        rank: This rank.
        seed: Determines the order.
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
        self.counts = rng.apportion(total, shares)

    def _order(self) -> Tensor:
        firsts = np.cumsum([0, *self.sizes[:-1]])
        parts = [
            first + self._source_rows(index)
            for index, first in enumerate(firsts)
            if self.counts[index]
        ]
        return torch.from_numpy(np.concatenate(parts))[super()._order()]

    def _source_rows(self, index: int) -> NDArray[np.int64]:
        """Return the rows of one source in this epoch: a slice of its repeated shuffles."""
        size, count = self.sizes[index], self.counts[index]
        start = self.epoch * count
        passes = range(start // size, -(-(start + count) // size))
        rows = np.concatenate(
            [rng.permutation(size, self.seed, index, number) for number in passes]
        )
        offset = start - passes[0] * size
        return rows[offset : offset + count]


def _parse_source(settings: Mapping[str, Any], prefix: str) -> SourceSettings:
    known = [field.name for field in fields(SourceSettings)]
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise ConfigError(f"{prefix} has no setting {unknown[0]!r}; it has {', '.join(known)}")
    weight = settings.get("weight")
    if not _is_number(weight) or not POSITIVE.holds(weight):
        raise ConfigError(f"{prefix}.weight must be a number above 0, got {weight!r}")
    for key in ("files", "validation_files"):
        paths = settings.get(key)
        is_list = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
        if paths is not None and not isinstance(paths, str) and not is_list:
            raise ConfigError(f"{prefix}.{key} must be a path or a list of paths, got {paths!r}")
    for key in ("text_column", "dataset", "dataset_config"):
        if not isinstance(settings.get(key, ""), str | None):
            raise ConfigError(f"{prefix}.{key} must be a string, got {settings[key]!r}")
    source = SourceSettings(**settings)
    source.check(prefix)
    if source.files is None and source.dataset is None:
        raise ConfigError(f"{prefix} has neither files nor a dataset; set one")
    return source


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sample_documents(documents: Any) -> Iterator[dict[str, str]]:
    if not hasattr(documents, "__len__"):
        return islice(iter(documents), _MAX_DOCUMENTS)
    count = min(len(documents), _MAX_DOCUMENTS)
    return (documents[index] for index in evenly_spaced(count, len(documents)))

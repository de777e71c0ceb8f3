"""Jobs on rows of tokens that are given, so that no text is read and `datasets` is not needed."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foam_lightning.data.rng import permutation
from foam_lightning.job import Job
from foam_lightning.plan import MemoryOptions
from tests.benchmarks.heading import ROOT
from tuner.config.parser import parse

_MANY_BATCHES = 2**20  # Lightning ends an epoch there


class Batches(Dataset[dict[str, Tensor]]):
    """Micro-batches of rows, in an order that each pass over the rows draws anew."""

    def __init__(self, rows: Tensor, micro_batch_size: int, seed: int | None, count: int) -> None:
        self.rows, self.micro_batch_size, self.count = rows, micro_batch_size, count
        self._order = lru_cache(maxsize=2)(lambda number: self._draw(seed, number))

    def _draw(self, seed: int | None, number: int) -> NDArray[np.int64]:
        size = len(self.rows)
        return np.arange(size) if seed is None else permutation(size, seed, number)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        first = number * self.micro_batch_size
        places = (divmod(i, len(self.rows)) for i in range(first, first + self.micro_batch_size))
        rows = self.rows[[int(self._order(times)[index]) for times, index in places]].long()
        return {"input_ids": rows, "labels": rows}


class TokenData(LightningDataModule):
    """Serve rows of tokens as batches, as `TextData` serves text."""

    def __init__(self, train: Tensor, validation: Tensor, micro_batch_size: int, seed: int) -> None:
        super().__init__()
        self._train = Batches(train, micro_batch_size, seed, _MANY_BATCHES)
        count = len(validation) // micro_batch_size
        self._validation = Batches(validation, micro_batch_size, None, count)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self._train, batch_size=None)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self._validation, batch_size=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenJob(Job):
    """A job whose data are these rows.

    Attributes:
        train: Token ids (rows, sequence_length), a micro-batch or more.
        validation: Those of the evaluation, as many.
    """

    train: Tensor
    validation: Tensor

    @classmethod
    def of(cls, job: Job, train: Tensor, validation: Tensor) -> Self:
        parts = {part.name: getattr(job, part.name) for part in fields(Job)}
        return cls(**parts, train=train, validation=validation)

    @classmethod
    def random(cls, job: Job) -> Self:
        """Make a job on one batch of random tokens, the same in every step, so the loss falls."""
        size = (job.data.batch_size, job.data.sequence_length)
        stream = torch.Generator().manual_seed(job.seed)
        rows = torch.randint(job.model.vocab_size, size, generator=stream, dtype=torch.int32)
        return cls.of(job, rows, rows)

    def new_data(self, memory_options: MemoryOptions, *, seed: int | None = None) -> Any:
        size, seed = memory_options.micro_batch_size, self.seed if seed is None else seed
        return TokenData(self.train, self.validation, size, seed)


def read_job(
    config: str,
    *,
    device: str,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Job:
    """Make the job of a file of configs/ on one device, with these settings replaced."""
    job = parse("fit", [], default=ROOT / "configs" / f"{config}.yaml").job()
    return replace(
        job,
        model=replace(job.model, **(model or {})),
        data=replace(job.data, **(data or {})),
        trainer=job.trainer.replace(accelerator=device, devices=1, **(trainer or {})),
    )

"""Loaders that resume in the middle of an epoch with the very next row."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from foam_lightning.data.packing import Row

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[Row]], Batch]


class EpochSampler(StatefulDistributedSampler):
    """Shuffle anew in every epoch, by seed and epoch alone, and resume in the middle of one.

    Ranks take the rows of one shuffled order in turn, so that what an optimizer step sees depends
    neither on the number of ranks nor on the size of a micro-batch.

    The epoch is part of the state, for two reasons found in Lightning 2.6: after a resume it tells
    the epoch only once the loader has started, and it counts an epoch twice that was interrupted
    after its very last step.
    """

    _surplus = 0  # how many epochs Lightning counts too many
    _resumed = False

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch by Lightning's count."""
        if self._resumed:
            self._surplus = epoch - self.epoch
            self._resumed = False
        super().set_epoch(epoch - self._surplus)

    def state_dict(self) -> dict[str, Any]:
        """Give the epoch and how many rows of it are done."""
        return {**super().state_dict(), "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the epoch of the state."""
        super().load_state_dict(state_dict)
        self.epoch = state_dict["epoch"]
        self._resumed = True


class ShareOfRows(Dataset[Row]):
    """Every rank's share of rows, as many for each; a row too few is one of padding alone.

    Ranks must run as many batches as each other: to gather weights they wait for one another.

    Args:
        rows: All rows, by position.
        world: Ranks.
        rank: Whose share this is.
    """

    def __init__(self, rows: Sequence[Row], world: int, rank: int) -> None:
        self._rows = rows
        self._world = world
        self._rank = rank

    def __len__(self) -> int:
        return -(-len(self._rows) // self._world)

    def __getitem__(self, index: int) -> Row:
        position = index * self._world + self._rank
        return self._rows[position] if position < len(self._rows) else Row(input_ids=[])


def resumable_loader(
    rows: Dataset[Row],
    collate: Collate,
    *,
    batch_size: int,
    num_workers: int,
    sampler: Sampler[int] | None = None,
) -> StatefulDataLoader[Row]:
    """Build a training loader whose state Lightning keeps in every checkpoint.

    Args:
        rows: Rows by position, or a stream of them that can tell its state.
        collate: Joins rows into a batch.
        batch_size: Rows in a batch; an incomplete last one is dropped.
        num_workers: Processes that load; 0 loads in this one.
        sampler: The order, for rows by position.
    """
    # Lightning warns of two dangers that are not here: rows lie ready in a memory-mapped file, and
    # a stream, whose length is known, has one worker at most.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*`IterableDataset` has `__len__` defined")
    with warnings.catch_warnings():
        # torchdata 0.11 calls torch.set_vital, which torch 2.13 deprecates.
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        return StatefulDataLoader(
            rows,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate,
            drop_last=True,
        )

"""Loaders that resume in the middle of an epoch with the very next row."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from foam_lightning.data.packing import Row
from foam_lightning.data.streaming import StreamedRows
from foam_lightning.errors import DataError
from foam_lightning.signals import survive_signals

Batch = dict[str, Tensor]
_Loader = TypeVar("_Loader", bound=StatefulDataLoader[Any])
Collate = Callable[[Sequence[Row]], Batch]
_ROWS_BETWEEN_STATES = 32  # a worker sends its state with so many rows; resuming counts the rest


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

    def __iter__(self) -> Iterator[int]:
        self.yielded, self.next_yielded = self.next_yielded or 0, None
        # No tensor: those that live while a step runs are counted as its memory.
        order = self._order().numpy().copy()
        for index in order[self.rank :: self.num_replicas][self.yielded :]:
            self.yielded += 1
            yield int(index)

    def _order(self) -> Tensor:
        """Shuffle all rows; a tensor, since a list takes five times the memory."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.dataset), generator=generator)[: self.total_size]  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Give the epoch and how many rows of it are done, by all ranks together."""
        return {"rows": self.yielded * self.num_replicas, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the epoch of the state, with the very next row for any number of ranks."""
        self.next_yielded = state_dict["rows"] // self.num_replicas
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


class StreamLoader:
    """Batches of streamed rows, in an order that neither a micro-batch nor a kill changes.

    Workers send single rows, in turn, and this process joins them: were batches theirs, a step
    would see other rows with other micro-batches. Its length is known, without which Lightning
    reads one batch ahead and does not resume exactly.

    Args:
        rows: The stream, without end.
        collate: Joins rows into a batch.
        batch_size: Rows in a batch.
        num_rows: After how many rows to stop.
        num_workers: Processes that read; 0 reads in this one.
    """

    def __init__(
        self,
        rows: StreamedRows,
        collate: Collate,
        *,
        batch_size: int,
        num_rows: int,
        num_workers: int,
    ) -> None:
        self.batch_size = batch_size
        self.num_rows = num_rows
        self.num_workers = num_workers
        self.num_ranks = rows.world
        self._collate = collate
        self._done = 0
        self._is_resumed = False
        self._last: dict[str, Any] | None = None
        ahead = max(2, -(-2 * batch_size // num_workers)) if num_workers else None
        self._rows = _stateful(
            rows,
            StatefulDataLoader,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            prefetch_factor=ahead,
            snapshot_every_n_steps=_ROWS_BETWEEN_STATES,
        )

    def __len__(self) -> int:
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        if not self._is_resumed:
            self._done = 0
        self._is_resumed = False
        self._last = None
        return self._batches(iter(self._rows))

    def state_dict(self) -> dict[str, Any]:
        """Describe the place after the batch yielded last."""
        return {
            "rows": self._done,
            "workers": self.num_workers,
            "ranks": self.num_ranks,
            "stream": self._last or self._rows.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration go on from such a place.

        Raises:
            DataError: So many workers or ranks would read other rows next.
        """
        before, now = (state["workers"], state["ranks"]), (self.num_workers, self.num_ranks)
        if before != now:
            raise DataError(
                f"the checkpoint's stream was read by data.num_workers {before[0]} on each of "
                f"{before[1]} devices, and this run has {now[0]} on {now[1]}; go on with as many, "
                "or start a new run"
            )
        self._rows.load_state_dict(state["stream"])
        self._last = None
        self._done = state["rows"]
        self._is_resumed = True

    def _batches(self, rows: Iterator[Row | DataError]) -> Iterator[Batch]:
        while self._done + self.batch_size <= self.num_rows:
            batch = [_row(item) for item in islice(rows, self.batch_size)]
            self._done += len(batch)
            if self._done + self.batch_size > self.num_rows:  # the workers may go
                self._last = self._rows.state_dict()
                self._rows.load_state_dict({})
                rows = iter(())
            yield self._collate(batch)


class RowLoader(StatefulDataLoader[Row]):
    """torchdata's loader, which says in one line what it cannot go on from."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the next iteration go on from a state.

        Raises:
            DataError: It was saved with another number of workers.
        """
        main = state_dict.get("_snapshot", {}).get("_main_snapshot", {})
        before = main.get("_num_workers", 0)
        if before != self.num_workers:
            raise DataError(
                f"the checkpoint's rows were loaded by data.num_workers {before} and this run has "
                f"{self.num_workers}; go on with as many"
            )
        super().load_state_dict(state_dict)


def resumable_loader(
    rows: Dataset[Row],
    collate: Collate,
    *,
    batch_size: int,
    num_workers: int,
    sampler: Sampler[int],
) -> RowLoader:
    """Build a training loader whose state Lightning keeps in every checkpoint.

    Args:
        rows: Rows by position.
        collate: Joins rows into a batch.
        batch_size: Rows in a batch; an incomplete last one is dropped.
        num_workers: Processes that load; 0 loads in this one.
        sampler: The order.
    """
    return _stateful(
        rows,
        RowLoader,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        drop_last=True,
    )


def _stateful(rows: Dataset[Any], kind: type[_Loader], **settings: Any) -> _Loader:
    # Lightning warns of a danger that is not here: rows lie ready in a memory-mapped file.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    with warnings.catch_warnings():
        # torchdata 0.11 calls torch.set_vital, which torch 2.13 deprecates.
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        # A loader seeds its workers; were the numbers drawn from torch's own generator, a run that
        # went on would draw others than one that did not.
        return kind(rows, generator=torch.Generator(), worker_init_fn=survive_signals, **settings)


def _row(item: Row | DataError) -> Row:
    if isinstance(item, DataError):
        raise item
    return item


def _as_it_is(row: Row | DataError) -> Row | DataError:
    return row

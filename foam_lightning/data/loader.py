"""Data loaders and samplers that resume exactly, also in the middle of an epoch.

Uses a private part of torchdata, checked on torchdata 0.11: the keys `_snapshot`, `_main_snapshot`
and `_num_workers` of the state of `StatefulDataLoader`. tests/data/test_data_module.py fails when
they change.
"""

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
from foam_lightning.data.table import Table
from foam_lightning.errors import DataError
from foam_lightning.signals import survive_signals

Batch = dict[str, Tensor]
_Loader = TypeVar("_Loader", bound=StatefulDataLoader[Any])
Collate = Callable[[Sequence[Row]], Batch]
WORKER_TIMEOUT_SECONDS = 600  # until a worker that sends nothing is an error, as for ranks in NCCL
_ROWS_PER_SNAPSHOT = 32  # a worker sends its state every 32 rows; resuming skips the rest


class EpochSampler(StatefulDistributedSampler):
    """Shuffles the rows of each epoch by seed and epoch, and resumes in the middle of one.

    Ranks take turns in one shuffled order, so that the rows of an optimizer step depend neither on
    the number of ranks nor on micro-batches.

    The epoch is part of the state because of Lightning 2.6: after a resume it sets the epoch only
    once the loader has started, and it counts an epoch that was interrupted after its last step
    twice.
    """

    _extra_epochs = 0  # that Lightning counted twice
    _is_resumed = False

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, as Lightning counts it."""
        if self._is_resumed:
            self._extra_epochs = epoch - self.epoch
            self._is_resumed = False
        super().set_epoch(epoch - self._extra_epochs)

    def __iter__(self) -> Iterator[int]:
        self.yielded, self.next_yielded = self.next_yielded or 0, None
        # Not a tensor: the memory account would count it as part of the training step.
        order = self._order().numpy().copy()
        for index in order[self.rank :: self.num_replicas][self.yielded :]:
            self.yielded += 1
            yield int(index)

    def _order(self) -> Tensor:
        """Return the shuffled rows, as a tensor because a list takes five times the memory."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.dataset), generator=generator)[: self.total_size]  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and the number of its rows that all ranks have read."""
        return {"rows": self.yielded * self.num_replicas, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the next row of the epoch, for any number of ranks."""
        self.next_yielded = state_dict["rows"] // self.num_replicas
        self.epoch = state_dict["epoch"]
        self._is_resumed = True


class RankRows(Dataset[Row]):
    """The rows of one rank, equally many on each; a missing last row is padding.

    Ranks must run equally many batches, since they wait for each other to gather weights.

    Args:
        rows: All rows.
        world: Number of ranks.
        rank: This rank.
    """

    def __init__(self, rows: Table | Sequence[Row], world: int, rank: int) -> None:
        self._rows = rows
        self._world = world
        self._rank = rank

    def __len__(self) -> int:
        return -(-len(self._rows) // self._world)

    def __getitem__(self, index: int) -> Row:
        position = index * self._world + self._rank
        return self._rows[position] if position < len(self._rows) else Row(input_ids=[])


class StreamLoader:
    """Batches of streamed rows, in an order that depends neither on batch size nor on resuming.

    Workers send single rows in turn, and this process collates them: if workers made batches, the
    rows of a step would depend on the micro-batch size. The loader has a length, without which
    Lightning would read one batch ahead and not resume exactly.

    Args:
        rows: The stream, endless.
        collate: Collates rows into a batch.
        batch_size: Rows in a batch.
        num_rows: Number of rows after which to stop.
        num_workers: Worker processes; 0 reads in this process.
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
        self._num_read = 0
        self._is_resumed = False
        self._last_state: dict[str, Any] | None = None
        prefetch = max(2, -(-2 * batch_size // num_workers)) if num_workers else None
        self._rows = _create_loader(
            rows,
            StatefulDataLoader,
            batch_size=None,
            collate_fn=_identity,
            num_workers=num_workers,
            prefetch_factor=prefetch,
            snapshot_every_n_steps=_ROWS_PER_SNAPSHOT,
        )

    def __len__(self) -> int:
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        if not self._is_resumed:
            self._num_read = 0
        self._is_resumed = False
        self._last_state = None
        return self._batches(iter(self._rows))

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batch yielded last."""
        return {
            "rows": self._num_read,
            "workers": self.num_workers,
            "ranks": self.num_ranks,
            "stream": self._last_state or self._rows.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state in the next iteration.

        Raises:
            DataError: The number of workers or ranks differs, so other rows would follow.
        """
        before, now = (state["workers"], state["ranks"]), (self.num_workers, self.num_ranks)
        if before != now:
            raise DataError(
                f"the checkpoint's stream was read with data.num_workers {before[0]} on "
                f"{before[1]} devices, this run has {now[0]} on {now[1]}; use the same numbers, or "
                "start a new run"
            )
        self._rows.load_state_dict(state["stream"])
        self._last_state = None
        self._num_read = state["rows"]
        self._is_resumed = True

    def _batches(self, rows: Iterator[Row | DataError]) -> Iterator[Batch]:
        while self._num_read + self.batch_size <= self.num_rows:
            batch = []
            for item in islice(rows, self.batch_size):
                if isinstance(item, DataError):
                    raise item
                batch.append(item)
            self._num_read += len(batch)
            if self._num_read + self.batch_size > self.num_rows:  # let the workers exit
                self._last_state = self._rows.state_dict()
                self._rows.load_state_dict({})
                rows = iter(())
            yield self._collate(batch)


class RowLoader(StatefulDataLoader[Row]):
    """torchdata's loader, with a clear error if the number of workers changed."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state in the next iteration.

        Raises:
            DataError: It was saved with another number of workers.
        """
        main = state_dict.get("_snapshot", {}).get("_main_snapshot", {})
        before = main.get("_num_workers", 0)
        if before != self.num_workers:
            raise DataError(
                f"the checkpoint was saved with data.num_workers {before}, this run has "
                f"{self.num_workers}; set data.num_workers {before}"
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
    """Create a training loader whose state Lightning saves in every checkpoint.

    Args:
        rows: All rows.
        collate: Collates rows into a batch.
        batch_size: Rows in a batch; an incomplete last one is dropped.
        num_workers: Worker processes; 0 loads in this process.
        sampler: The order.
    """
    return _create_loader(
        rows,
        RowLoader,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        drop_last=True,
    )


def worker_timeout(num_workers: int) -> int:
    """Return the timeout of a DataLoader in seconds; without workers it must be 0."""
    return WORKER_TIMEOUT_SECONDS if num_workers else 0


def _create_loader(rows: Dataset[Any], kind: type[_Loader], **settings: Any) -> _Loader:
    # Workers would not help: rows are read from a memory-mapped file.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    with warnings.catch_warnings():
        # torchdata 0.11 calls torch.set_vital, which torch 2.13 deprecates.
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        # Its own generator: seeds of workers drawn from torch's global one would change what a
        # resumed run draws next.
        return kind(
            rows,
            generator=torch.Generator(),
            worker_init_fn=survive_signals,
            timeout=worker_timeout(settings["num_workers"]),
            **settings,
        )


def _identity(row: Row | DataError) -> Row | DataError:
    return row

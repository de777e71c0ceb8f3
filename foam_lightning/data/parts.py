"""The batches of a loader of somebody's own, checked, and taken apart into micro-batches.

Its batches are those of optimizer steps, so that the rows of a step depend neither on the
micro-batch size that a budget chooses nor on the number of devices.
"""

import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foam_lightning.data.conversations import IGNORED
from foam_lightning.data.rng import random_integer
from foam_lightning.errors import ConfigError, DataError
from foam_lightning.settings import DataSettings

Rows = NDArray[np.int64]
_OTHER_ORDER = (
    "has other batches than when it was read before, so short runs do not compare and a resumed "
    "run would read rows twice; let their order follow from torch's global random numbers, or from "
    "a generator that train_dataloader() makes anew"
)


class PartsLoader:
    """A loader whose batches are taken apart into the micro-batches of one rank.

    It knows its epoch and position. To resume it reads the batches before them again, and the last
    of these has to be the one that was read then.

    Args:
        loader: Has a length, and batches of `data.batch_size` rows; fewer only for evaluation.
        name: For errors.
        settings: The sizes of a batch.
        seed: Seeds each epoch of the loader.
        ranks: Number of ranks, and this rank.
        is_training: Each iteration is another epoch; otherwise all are the same.
        check_first: Called with the digest of the first batch; whether it is what it was before.

    Raises:
        ConfigError: The loader has no length, no batch, or would end with a smaller one.
    """

    def __init__(
        self,
        loader: Any,
        name: str,
        settings: DataSettings,
        *,
        seed: int,
        ranks: tuple[int, int],
        is_training: bool,
        check_first: Callable[[int], bool],
    ) -> None:
        self._loader = loader
        self._name = name
        self._settings = settings
        self._seed = seed
        self._world, self._rank = ranks
        self._is_training = is_training
        self._check_first = check_first
        self._epoch, self._num_read, self._last = -1, 0, 0  # _last: digest of the last batch
        self._is_resumed = False
        self._micro = settings.micro_batch_size or settings.batch_size
        self._num_batches = self._count_batches()

    def __len__(self) -> int:
        return self._num_batches * (self._settings.batch_size // (self._micro * self._world))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # Nothing happens before the first batch is asked for: Lightning creates iterators that it
        # does not use.
        num_skipped = self._num_read if self._is_resumed else 0
        if num_skipped in (0, self._num_batches):
            self._epoch, num_skipped = self._epoch + self._is_training, 0
        self._is_resumed = False
        for number, (input_ids, labels) in enumerate(self._batches(max(self._epoch, 0)), start=1):
            digest = zlib.crc32(labels.tobytes(), zlib.crc32(input_ids.tobytes()))
            if number == num_skipped and digest != self._last:
                raise DataError(f"{self._name} {_OTHER_ORDER}")
            if number == 1 and self._epoch < 1 and not self._check_first(digest):
                raise DataError(f"{self._name} {_OTHER_ORDER}")
            if number <= num_skipped:
                continue
            self._num_read, self._last = number, digest
            for start in range(self._rank, len(input_ids), self._micro * self._world):
                rows = slice(start, start + self._micro * self._world, self._world)
                yield {
                    "input_ids": torch.from_numpy(input_ids[rows].copy()),
                    "labels": torch.from_numpy(labels[rows].copy()),
                }

    def state_dict(self) -> dict[str, int]:
        """Return the position after the batch that was read last, for any number of ranks."""
        return {"epoch": self._epoch, "batches": self._num_read, "digest": self._last}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state in the next iteration."""
        self._epoch, self._num_read = state["epoch"], state["batches"]
        self._last = state["digest"]
        self._is_resumed = True

    def _batches(self, epoch: int) -> Iterator[tuple[Rows, Rows]]:
        """Read an epoch, with random numbers of its own."""
        set_epoch = getattr(getattr(self._loader, "sampler", None), "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        numbers = _RandomNumbers(random_integer(self._seed, epoch))
        with numbers:
            batches = iter(self._loader)
        for number in range(1, self._num_batches + 1):
            with numbers:
                batch = next(batches, None)
            if batch is None:
                raise DataError(
                    f"{self._name} ends after {number - 1} of the {self._num_batches} batches of "
                    "its len()"
                )
            where = f"{self._name}, batch {number}:"
            yield read_batch(batch, self._settings, where, is_training=self._is_training)

    def _count_batches(self) -> int:
        try:
            num_batches = len(self._loader)
        except Exception as error:  # None, or an IterableDataset without a length
            raise ConfigError(
                f"{self._name} has no length, without which no run resumes exactly; give its "
                "IterableDataset a __len__()"
            ) from error
        if not num_batches:
            raise ConfigError(f"{self._name} has no batch of data.batch_size rows")
        batch_size = self._settings.batch_size
        may_be_smaller = getattr(self._loader, "drop_last", None) is False
        if self._is_training and may_be_smaller and getattr(self._loader, "batch_size", None):
            rest = len(self._loader.dataset) % batch_size
            if rest:
                raise ConfigError(
                    f"{self._name} ends with a batch of {rest} rows, and a step has "
                    f"data.batch_size {batch_size}; create the DataLoader with drop_last=True"
                )
        return num_batches


def read_batch(
    batch: Any, settings: DataSettings, where: str, *, is_training: bool
) -> tuple[Rows, Rows]:
    """Check a batch, and pad it to the size that the account of memory counts.

    Args:
        batch: As docs/data.md describes it.
        settings: Its sizes, and the number of token ids.
        where: Begins an error.
        is_training: Whether it has to be complete.

    Returns:
        Token ids and labels, both (batch_size, sequence_length). Not tensors, which a measurement
        of memory would count as part of the training step.

    Raises:
        DataError: It is of another form.
    """
    num_rows, num_columns = settings.batch_size, settings.sequence_length
    ids, labels, mask = _read_tensors(batch, where)
    rows, columns = ids.shape
    if rows > num_rows or (is_training and rows < num_rows):
        raise DataError(
            f"{where} it has {rows} rows, and a step has data.batch_size {num_rows}; make both "
            "equal"
        )
    if columns > num_columns:
        raise DataError(
            f"{where} its rows have {columns} tokens, and memory is planned for "
            f"data.sequence_length {num_columns}; cut them off, or set it to {columns}"
        )
    _check_values(ids, labels, mask, settings.vocab_size, where)
    padded_ids = np.zeros((num_rows, num_columns), np.int64)
    padded_labels = np.full((num_rows, num_columns), IGNORED, np.int64)
    padded_ids[:rows, :columns] = ids.numpy(force=True)
    padded_labels[:rows, :columns] = labels.numpy(force=True)
    return padded_ids, padded_labels


def _read_tensors(batch: Any, where: str) -> tuple[Tensor, Tensor, Tensor | None]:
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
        found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(f"{where} it is {found}; expected a dict of input_ids and labels")
    if unknown := sorted(map(str, batch.keys() - {"input_ids", "labels", "attention_mask"})):
        raise DataError(f"{where} the model takes no {', '.join(unknown)}; leave it out")
    shape = getattr(batch["input_ids"], "shape", None)
    for name, one in batch.items():
        is_integer = isinstance(one, Tensor) and not one.is_floating_point()
        if not is_integer or one.ndim != 2 or one.shape != shape:
            kind = f"{one.dtype} {tuple(one.shape)}" if isinstance(one, Tensor) else type(one)
            raise DataError(f"{where} {name} is {kind}; expected integers (rows, tokens), as all")
    return batch["input_ids"], batch["labels"], batch.get("attention_mask")


def _check_values(
    ids: Tensor, labels: Tensor, mask: Tensor | None, vocab_size: int, where: str
) -> None:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise DataError(
            f"{where} input_ids are from {int(ids.min())} to {int(ids.max())}, and the model has "
            f"model.vocab_size {vocab_size}"
        )
    if bool(((labels != ids) & (labels != IGNORED)).any()):
        raise DataError(
            f"{where} labels differ from input_ids; they are the same tokens, not shifted, and "
            f"{IGNORED} where nothing is learned"
        )
    if mask is None:
        return
    is_masked = mask == 0
    if bool((is_masked[:, :-1] & ~is_masked[:, 1:]).any()):
        raise DataError(f"{where} attention_mask hides tokens before others; pad on the right")
    if bool((is_masked & (labels != IGNORED)).any()):
        raise DataError(f"{where} labels are not {IGNORED} where attention_mask is 0")


class _RandomNumbers:
    """Global random numbers of torch, NumPy and Python that are others' outside of a `with`."""

    def __init__(self, seed: int) -> None:
        torch_state = torch.Generator().manual_seed(seed % 2**63).get_state()
        numpy_state = np.random.RandomState(seed % 2**32).get_state()
        self._states: Any = (torch_state, numpy_state, random.Random(seed).getstate())

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    def _swap(self) -> None:
        outside = torch.get_rng_state(), np.random.get_state(), random.getstate()
        torch_state, numpy_state, python_state = self._states
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        self._states = outside

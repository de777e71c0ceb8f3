"""Shuffled rows from streams of documents, resumable at every row."""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from foam_lightning.data import rng
from foam_lightning.data.files import Document, Shard
from foam_lightning.data.packing import Packer, Row
from foam_lightning.data.tokenizer import encode, end_of_text_id
from foam_lightning.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCK_CHARACTERS = 2**21  # about 1000 documents of C4, a usual size of a shuffle buffer


class ReaderSlot(NamedTuple):
    """Which part of a stream a process reads.

    Attributes:
        number: Of this process among the workers of all ranks.
        total: How many processes there are.
    """

    number: int
    total: int


class _Read(NamedTuple):
    document: Document
    shards: int  # read before this shard, in this pass
    documents: int  # read of this shard, including this one
    shard: Shard


class StreamedSource:
    """The rows of one stream for one process, shuffled in blocks, endless.

    A shuffle buffer cannot be resumed, as its content is not saved. Instead, documents are read in
    blocks of two million characters, and the rows of each block are shuffled. The position is the
    start of a block and the number of its rows read so far; resuming reads that block again.

    Every pass has another order of shards, which the processes divide among them. If there are
    fewer shards than processes, each process reads all shards and keeps its part of the documents.

    Args:
        shards: The stream.
        tokenizer: Its end-of-text token follows each document.
        sequence_length: Tokens in a full row.
        packing: Fill every row; otherwise each document is a row of its own.
        seed: Determines the order of shards and rows.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        sequence_length: int,
        packing: bool,
        seed: int,
    ) -> None:
        self.shards = shards
        self.tokenizer = tokenizer
        self.packer = Packer(sequence_length, end_of_text_id(tokenizer), packing=packing)
        self.seed = seed
        self._next: dict[str, Any] = {}
        self.load_state_dict(None)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the row read last."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from a state in the next iteration; None is the beginning."""
        self._state = dict(state) if state else {"pass": 0, "block": 0, "tail": [], **_START}

    def rows(self, slot: ReaderSlot) -> Iterator[Row]:
        """Read, tokenise, pack and shuffle, starting at the current position.

        Args:
            slot: The part of the stream to read.

        Raises:
            DataError: A shard is unreadable, or a whole pass has less text than one row.
        """
        has_rows = self._state["block"] > 0 or self._state["rows"] > 0
        self.packer.restart(self._state["tail"])
        while True:
            documents = self._read_pass(slot)
            while block := self._read_block(documents):
                rows = self._pack(block)
                has_rows = has_rows or bool(rows)
                yield from self._shuffle(rows, slot)
                self._state = {
                    **self._state,
                    **self._next,
                    "block": self._state["block"] + 1,
                    "tail": list(self.packer.tail),
                }
            if not has_rows:
                raise DataError(
                    "the whole stream is shorter than one sequence; use a longer dataset, or lower "
                    "data.sequence_length or data.num_workers"
                )
            has_rows = False
            self._state = {**self._state, "pass": self._state["pass"] + 1, **_START}

    def _read_pass(self, slot: ReaderSlot) -> Iterator[_Read]:
        """Read the documents of the slot from the current position to the end of the pass."""
        state = self._state
        order = rng.permutation(len(self.shards), self.seed, state["pass"])
        is_own = len(self.shards) >= slot.total  # each shard is read by one process
        mine = order[slot.number :: slot.total] if is_own else order
        before, position = state["documents"], state["place"]
        for done in range(state["shards"], len(mine)):
            shard = self.shards[mine[done]]
            for index, document in enumerate(shard.read(position), start=before):
                if is_own or index % slot.total == slot.number:
                    yield _Read(document, done, index + 1, shard)
            before, position = 0, None

    def _read_block(self, documents: Iterator[_Read]) -> list[Document]:
        """Read one block of documents, and remember where the next block starts."""
        block = []
        left = _BLOCK_CHARACTERS
        self._next = {}  # after the last block comes another pass
        for read in documents:
            block.append(read.document)
            left -= len(read.document)
            if left <= 0:
                self._next = {
                    "shards": read.shards,
                    "documents": read.documents,
                    "place": read.shard.position(),
                    "rows": 0,
                }
                break
        return block

    def _pack(self, documents: list[Document]) -> list[NDArray[np.int32]]:
        for piece in encode(self.tokenizer, documents):
            self.packer.add(piece)
        return [np.asarray(ids, dtype=np.int32) for ids in self.packer.rows()]

    def _shuffle(self, rows: list[NDArray[np.int32]], slot: ReaderSlot) -> Iterator[Row]:
        start, taken = self._state, self._state["rows"]
        for index in rng.permutation(len(rows), self.seed, slot.number, start["block"])[taken:]:
            taken += 1
            self._state = {**start, "rows": taken}
            yield {"input_ids": rows[index]}


# Position at the beginning of a pass; the keys are those of checkpoints.
_START: dict[str, Any] = {"shards": 0, "documents": 0, "place": None, "rows": 0}


class StreamedRows(IterableDataset[Row | DataError]):
    """Rows of several streams, mixed at random in proportion to their shares, endless.

    The order depends on the seed, the streams and the numbers of workers and ranks, not on
    micro-batches or resuming. One worker reads the same rows as none.

    An error is yielded as the last item; raised in a worker, it would arrive as a long traceback.

    Args:
        sources: The streams.
        shares: Share of each stream; they add up to 1.
        seed: Determines which stream each row comes from.
        world: Number of ranks.
        rank: This rank.
    """

    def __init__(
        self,
        sources: Sequence[StreamedSource],
        shares: Sequence[float],
        *,
        seed: int,
        world: int = 1,
        rank: int = 0,
    ) -> None:
        self.sources = sources
        self.shares = shares
        self.seed = seed
        self.world = world
        self.rank = rank
        self._num_rows = 0
        self._is_resumed = False

    def __iter__(self) -> Iterator[Row | DataError]:
        if not self._is_resumed:
            self._set_position(0, [None] * len(self.sources))
        self._is_resumed = False
        slot = self._slot()
        streams = [source.rows(slot) for source in self.sources]
        while True:
            chosen = rng.weighted_choice(self.shares, self.seed, slot.number, self._num_rows)
            try:
                row = next(streams[chosen])
            except DataError as error:
                yield error
                return
            self._num_rows += 1
            yield row

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the row yielded last."""
        return {
            "drawn": self._num_rows,
            "sources": [source.state_dict() for source in self.sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state in the next iteration."""
        self._set_position(state["drawn"], state["sources"])
        self._is_resumed = True

    def _set_position(self, num_rows: int, states: Sequence[dict[str, Any] | None]) -> None:
        self._num_rows = num_rows
        for source, state in zip(self.sources, states, strict=True):
            source.load_state_dict(state)

    def _slot(self) -> ReaderSlot:
        info = get_worker_info()
        if info is None:
            return ReaderSlot(self.rank, self.world)
        # The threads of the tokenizer do not exist in a forked worker.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return ReaderSlot(self.rank * info.num_workers + info.id, self.world * info.num_workers)

"""Rows straight from streams of documents, shuffled, and resumable at every row."""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from foam_lightning.data import rng as draw
from foam_lightning.data.files import Shard
from foam_lightning.data.packing import Packer, Row
from foam_lightning.data.tokenizer import encode, end_of_text
from foam_lightning.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCK_CHARACTERS = 2**21  # about 1000 documents of C4: the buffer that it is usually shuffled by


class Lane(NamedTuple):
    """Which part of a stream a process reads.

    Attributes:
        position: Of this process, counted over the workers of all ranks.
        total: How many processes there are.
    """

    position: int
    total: int


class _Read(NamedTuple):
    text: str
    shards: int  # finished before this document's, in this pass
    documents: int  # read of its shard, with this one
    shard: Shard


class StreamedSource:
    """The rows of one stream in one lane, block by block, without end.

    A shuffle buffer cannot be resumed: what it holds is lost. So documents are read up to a block
    of two million characters, its rows are shuffled, and only then comes the next block. A place
    in the stream is the beginning of a block and how many of its rows have been taken, and going
    on means to read that block again.

    In every pass the shards come in another order, and each lane takes its share of them; where
    there are fewer shards than lanes, each reads all of them and takes its share of the documents.

    Args:
        shards: The stream.
        tokenizer: Its end-of-text token follows each document.
        sequence_length: Tokens in a full row.
        packing: Fill every row, rather than give each document its own.
        seed: Decides the order of shards and rows.
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
        self.packer = Packer(sequence_length, end_of_text(tokenizer), packing=packing)
        self.seed = seed
        self._next: dict[str, Any] = {}
        self.load_state_dict(None)

    def state_dict(self) -> dict[str, Any]:
        """Describe the place after the row taken last."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Make the next iteration go on from such a place; from the beginning where it is None."""
        self._state = dict(state) if state else {"pass": 0, "block": 0, "tail": [], **_START}

    def rows(self, lane: Lane) -> Iterator[Row]:
        """Read, tokenise, pack and shuffle, from the place of the state on.

        Args:
            lane: Which part of the stream.

        Raises:
            DataError: A shard cannot be read, or a whole pass gave no row.
        """
        is_fruitful = self._state["block"] > 0 or self._state["rows"] > 0
        self.packer.load_state_dict({"tail": self._state["tail"], "rows": []})
        while True:
            documents = self._one_pass(lane)
            while texts := self._block(documents):
                rows = self._packed(texts)
                is_fruitful = is_fruitful or bool(rows)
                yield from self._shuffled(rows, lane)
                self._state = {
                    **self._state,
                    **self._next,
                    "block": self._state["block"] + 1,
                    "tail": self.packer.state_dict()["tail"],
                }
            if not is_fruitful:
                raise DataError(
                    "a whole pass over the stream gave no full sequence; give a longer dataset, or "
                    "lower data.sequence_length or data.num_workers"
                )
            is_fruitful = False
            self._state = {**self._state, "pass": self._state["pass"] + 1, **_START}

    def _one_pass(self, lane: Lane) -> Iterator[_Read]:
        """Read the lane's documents from the place of the state to the end of the pass."""
        state = self._state
        order = draw.order(len(self.shards), self.seed, state["pass"])
        is_own = len(self.shards) >= lane.total  # a shard is of one lane alone
        mine = order[lane.position :: lane.total] if is_own else order
        before, place = state["documents"], state["place"]
        for done in range(state["shards"], len(mine)):
            shard = self.shards[mine[done]]
            for index, text in enumerate(shard.read(place), start=before):
                if is_own or index % lane.total == lane.position:
                    yield _Read(text, done, index + 1, shard)
            before, place = 0, None

    def _block(self, documents: Iterator[_Read]) -> list[str]:
        """Take documents up to the size of a block, and note where the next one begins."""
        texts = []
        left = _BLOCK_CHARACTERS
        self._next = {}  # beyond the last block of a pass there is another pass
        for read in documents:
            texts.append(read.text)
            left -= len(read.text)
            if left <= 0:
                self._next = {
                    "shards": read.shards,
                    "documents": read.documents,
                    "place": read.shard.place(),
                    "rows": 0,
                }
                break
        return texts

    def _packed(self, texts: list[str]) -> list[NDArray[np.int32]]:
        for piece in encode(self.tokenizer, texts):
            self.packer.add(piece)
        return [np.asarray(ids, dtype=np.int32) for ids in self.packer.rows()]

    def _shuffled(self, rows: list[NDArray[np.int32]], lane: Lane) -> Iterator[Row]:
        start, taken = self._state, self._state["rows"]
        for index in draw.order(len(rows), self.seed, lane.position, start["block"])[taken:]:
            taken += 1
            self._state = {**start, "rows": taken}
            yield {"input_ids": rows[index]}


_START: dict[str, Any] = {"shards": 0, "documents": 0, "place": None, "rows": 0}


class StreamedRows(IterableDataset[Row | DataError]):
    """Rows of several streams, each as often as its share says, without end.

    Which row comes next depends on the seed, the streams, and how many workers of how many ranks
    share them; neither on micro-batches nor on an interruption. One worker reads what none would.

    An error comes as the last item: raised in a worker it would arrive as a page of text.

    Args:
        sources: The streams.
        shares: How much of each; they add up to 1.
        seed: Decides which stream a row is of.
        world: Ranks.
        rank: Whose rows these are.
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
        self._drawn = 0
        self._is_resumed = False

    def __iter__(self) -> Iterator[Row | DataError]:
        if not self._is_resumed:
            self._go_to(0, [None] * len(self.sources))
        self._is_resumed = False
        lane = self._lane()
        streams = [source.rows(lane) for source in self.sources]
        while True:
            chosen = draw.choice(self.shares, self.seed, lane.position, self._drawn)
            try:
                row = next(streams[chosen])
            except DataError as error:
                yield error
                return
            self._drawn += 1
            yield row

    def state_dict(self) -> dict[str, Any]:
        """Describe the place after the row yielded last."""
        return {
            "drawn": self._drawn,
            "sources": [source.state_dict() for source in self.sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration go on from such a place."""
        self._go_to(state["drawn"], state["sources"])
        self._is_resumed = True

    def _go_to(self, drawn: int, states: Sequence[dict[str, Any] | None]) -> None:
        self._drawn = drawn
        for source, state in zip(self.sources, states, strict=True):
            source.load_state_dict(state)

    def _lane(self) -> Lane:
        info = get_worker_info()
        if info is None:
            return Lane(self.rank, self.world)
        # A worker process is a fork, in which the tokenizer's threads no longer exist.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return Lane(self.rank * info.num_workers + info.id, self.world * info.num_workers)

"""Rows straight from a stream of documents, resumable at every row."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from foam_lightning.data.packing import Packer, Row
from foam_lightning.data.tokenizer import encode, end_of_text
from foam_lightning.errors import DataError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


class StreamedRows(IterableDataset[Row]):
    """Tokenise and pack a stream of documents while it is read.

    The order is that of the stream: a shuffle buffer would be lost in an interruption. When the
    stream ends it is read again, with its shards in another order.

    Args:
        documents: The stream, with the column "text".
        tokenizer: Its end-of-text token follows each document.
        sequence_length: Tokens in a full row.
        packing: Fill every row, rather than give each document its own.
        num_rows: After how many rows to stop. Lightning resumes exactly in the middle of an epoch
            only where the length is known.

    Raises:
        DataError: While iterating, a whole pass over the stream gave no row.
    """

    def __init__(
        self,
        documents: "datasets.IterableDataset",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        sequence_length: int,
        packing: bool,
        num_rows: int,
    ) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.packer = Packer(sequence_length, end_of_text(tokenizer), packing=packing)
        self.num_rows = num_rows
        self._pass = 0
        self._yielded = 0
        self._resume: dict[str, Any] | None = None

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[Row]:
        if get_worker_info() is not None:
            # A worker process is a fork, in which the tokenizer's threads no longer exist.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._start()
        while self._yielded < self.num_rows:
            before = self._yielded
            yield from self._finished()
            self.documents.set_epoch(self._pass)
            for document in self.documents:
                for piece in encode(self.tokenizer, [document["text"]]):
                    self.packer.add(piece)
                yield from self._finished()
                if self._yielded >= self.num_rows:
                    return
            if self._yielded == before:
                raise DataError(
                    "a whole pass over the stream gave no full sequence; give a longer dataset, "
                    "or lower data.sequence_length"
                )
            self._pass += 1

    def state_dict(self) -> dict[str, Any]:
        """Describe the place after the row yielded last."""
        if self._resume is not None:
            return self._resume
        return {
            "documents": self.documents.state_dict(),
            "packer": self.packer.state_dict(),
            "pass": self._pass,
            "yielded": self._yielded,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration go on from such a place."""
        self._resume = state

    def _start(self) -> None:
        state, self._resume = self._resume, None
        self._pass = state["pass"] if state else 0
        self._yielded = state["yielded"] if state else 0
        self.packer.load_state_dict(state["packer"] if state else {"tail": [], "rows": []})
        # Without this a stream goes back to the place it was once resumed at.
        self.documents.load_state_dict(state["documents"] if state else None)

    def _finished(self) -> Iterator[Row]:
        for ids in self.packer.rows():
            self._yielded += 1
            yield {"input_ids": ids}
            if self._yielded >= self.num_rows:
                return

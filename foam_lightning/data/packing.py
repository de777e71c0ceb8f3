"""Documents to rows of tokens, and rows to batches."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import torch
from torch import Tensor

from foam_lightning.data.cache import cache_key, cached_dataset
from foam_lightning.data.tokenizer import Piece, encode, end_of_text, fingerprint_of
from foam_lightning.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that the loss leaves out
_DOCUMENTS_AT_ONCE = 256


class Row(TypedDict):
    """One sequence as it is stored.

    Attributes:
        input_ids: `sequence_length` tokens, or fewer where padding will follow.
        labels: As many, -100 where nothing is scored; the same tokens where it is not there.
    """

    input_ids: Sequence[int]
    labels: NotRequired[Sequence[int]]


class PackerState(TypedDict):
    """What a `Packer` holds between two rows.

    Attributes:
        tail: Tokens that wait for the rest of their row.
        rows: Finished rows that nobody has taken yet.
    """

    tail: list[int]
    rows: list[list[int]]


class Packer:
    """Cut a flow of documents into rows.

    Packed, documents follow each other with the end-of-text token between them, and every row is
    full. Otherwise each document is a row of its own, cut off at `sequence_length`: the recipe of
    GaLore and of the FOAM paper.

    Args:
        sequence_length: Tokens in a full row.
        end_of_text: The token put after each document.
        packing: Which of the two.
    """

    def __init__(self, sequence_length: int, end_of_text: int, *, packing: bool) -> None:
        self.sequence_length = sequence_length
        self.end_of_text = end_of_text
        self.packing = packing
        self._tail: list[int] = []
        self._rows: deque[list[int]] = deque()

    def add(self, piece: Piece) -> None:
        """Take in the next piece of the flow."""
        ids = [*piece.ids, self.end_of_text] if piece.ends else piece.ids
        length = self.sequence_length
        if self.packing:
            self._tail += ids
            full = len(self._tail) - len(self._tail) % length
            self._rows.extend(self._tail[at : at + length] for at in range(0, full, length))
            del self._tail[:full]
            return
        self._tail = ids[:length] if piece.starts else [*self._tail, *ids][:length]
        if piece.ends:
            self._rows.append(self._tail)
            self._tail = []

    def rows(self) -> Iterator[list[int]]:
        """Hand over the finished rows, oldest first."""
        while self._rows:
            yield self._rows.popleft()

    def state_dict(self) -> PackerState:
        """Copy what is held."""
        return {"tail": list(self._tail), "rows": list(self._rows)}

    def load_state_dict(self, state: PackerState) -> None:
        """Hold what another packer held."""
        self._tail = list(state["tail"])
        self._rows = deque(state["rows"])


def packed_dataset(
    documents: "Dataset",
    *,
    tokenizer: "PreTrainedTokenizerBase",
    fingerprint: str,
    sequence_length: int,
    packing: bool,
    cache: Path,
) -> "Dataset":
    """Tokenise and pack a whole split into a memory-mapped dataset of rows.

    Only the last row of the split is dropped where it is not full.

    Args:
        documents: The split, with the column "text".
        tokenizer: Its end-of-text token follows each document.
        fingerprint: Names the documents.
        sequence_length: Tokens in a full row.
        packing: Fill every row, rather than give each document its own.
        cache: Where the rows are kept, so that the next call is quick.
    """
    import pyarrow as pa

    schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
    key = cache_key(2, fingerprint, fingerprint_of(tokenizer), sequence_length, packing)

    def batches() -> Iterator[tuple["pa.RecordBatch", int]]:
        packer = Packer(sequence_length, end_of_text(tokenizer), packing=packing)
        for texts in documents.iter(batch_size=_DOCUMENTS_AT_ONCE):
            for piece in encode(tokenizer, texts["text"]):
                packer.add(piece)
            rows = pa.array(list(packer.rows()), schema.field(0).type)
            yield pa.record_batch([rows], schema=schema), len(texts["text"])

    rows = cached_dataset(
        cache / f"rows-{key}.arrow",
        schema,
        batches,
        content="tokens",
        num_documents=len(documents),
    )
    return rows.with_format("numpy")


def packed_rows(
    documents: Iterable[dict[str, str]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sequence_length: int,
    packing: bool,
) -> Iterator[Row]:
    """Tokenise and pack documents one by one, as far as somebody asks for rows."""
    packer = Packer(sequence_length, end_of_text(tokenizer), packing=packing)
    for document in documents:
        for piece in encode(tokenizer, [document["text"]]):
            packer.add(piece)
        for ids in packer.rows():
            yield {"input_ids": ids}


def num_in_whole_batches(num_rows: int, batch_size: int, sequence_length: int) -> int:
    """Count the rows that fill batches; with more, the last step of an epoch would see fewer.

    Raises:
        DataError: There is not one batch.
    """
    if num_rows < batch_size:
        raise DataError(
            f"the training text makes {num_rows} sequences of {sequence_length} tokens, fewer "
            f"than one batch of {batch_size}; give more text, or lower data.sequence_length or "
            "data.batch_size"
        )
    return num_rows // batch_size * batch_size


def even_subset(count: int, total: int) -> list[int]:
    """Choose `count` of `total` positions, each in the middle of its equal share."""
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def collate(rows: Sequence[Row], *, sequence_length: int, pad: int) -> dict[str, Tensor]:
    """Join rows into a batch.

    Args:
        rows: B of them.
        sequence_length: S, the length that short rows are filled up to.
        pad: The token they are filled with.

    Returns:
        "input_ids" and "labels", both int64 (B, S). The labels are the same tokens, not shifted,
        and -100 where there is only padding, or where a row says so.
    """
    input_ids = torch.full((len(rows), sequence_length), pad)
    labels = torch.full((len(rows), sequence_length), IGNORED)
    for index, row in enumerate(rows):
        ids = torch.as_tensor(row["input_ids"])
        input_ids[index, : len(ids)] = ids
        labels[index, : len(ids)] = torch.as_tensor(row["labels"]) if "labels" in row else ids
    return {"input_ids": input_ids, "labels": labels}

"""Pack documents into rows of tokens, and collate rows into batches."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import torch
from torch import Tensor

from foam_lightning.data.cache import cache_key, cached_table
from foam_lightning.data.conversations import IGNORED
from foam_lightning.data.files import Document, documents_of
from foam_lightning.data.tokenizer import Piece, encode, end_of_text_id, tokenizer_fingerprint
from foam_lightning.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from foam_lightning.data.table import Table

_DOCUMENTS_PER_BATCH = 256


class Row(TypedDict):
    """One stored sequence.

    Attributes:
        input_ids: `sequence_length` tokens, or fewer, to be padded.
        labels: The same tokens, or -100 where ignored; if missing, equal to `input_ids`.
    """

    input_ids: Sequence[int]
    labels: NotRequired[Sequence[int]]


class Packer:
    """Split a sequence of documents into rows.

    Args:
        sequence_length: Tokens in a full row.
        end_of_text: Token appended to each document.
        packing: Concatenate documents, so that every row is full. Otherwise each document is a row
            of its own, truncated at `sequence_length`, as in GaLore and the FOAM paper.

    Attributes:
        tail: Tokens of the unfinished row.
    """

    def __init__(self, sequence_length: int, end_of_text: int, *, packing: bool) -> None:
        self.sequence_length = sequence_length
        self.end_of_text = end_of_text
        self.packing = packing
        self.tail: list[int] = []
        self._rows: deque[list[int]] = deque()

    def add(self, piece: Piece) -> None:
        """Add the next piece of a document."""
        ids = [*piece.ids, self.end_of_text] if piece.ends else piece.ids
        length = self.sequence_length
        if self.packing:
            self.tail += ids
            full = len(self.tail) - len(self.tail) % length
            self._rows.extend(self.tail[at : at + length] for at in range(0, full, length))
            del self.tail[:full]
            return
        self.tail = ids[:length] if piece.starts else [*self.tail, *ids][:length]
        if piece.ends:
            self._rows.append(self.tail)
            self.tail = []

    def rows(self) -> Iterator[list[int]]:
        """Yield and remove the finished rows, oldest first."""
        while self._rows:
            yield self._rows.popleft()

    def restart(self, tail: Sequence[int]) -> None:
        """Continue after the tokens of an unfinished row."""
        self.tail = list(tail)
        self._rows.clear()


def packed_dataset(
    documents: "Table | Dataset",
    *,
    tokenizer: "PreTrainedTokenizerBase",
    fingerprint: str,
    sequence_length: int,
    packing: bool,
    cache: Path,
) -> "Table":
    """Tokenise and pack a split into a memory-mapped table of rows.

    With packing, an incomplete last row is dropped.

    Args:
        documents: The split, for `documents_of`.
        tokenizer: Its end-of-text token follows each document.
        fingerprint: Cache key of the documents.
        sequence_length: Tokens in a full row.
        packing: Fill every row; otherwise each document is a row of its own.
        cache: Folder in which the rows are cached.
    """
    import pyarrow as pa

    schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
    key = cache_key(2, fingerprint, tokenizer_fingerprint(tokenizer), sequence_length, packing)

    def batches() -> Iterator[tuple["pa.RecordBatch", int]]:
        packer = Packer(sequence_length, end_of_text_id(tokenizer), packing=packing)
        for texts in documents.iter(batch_size=_DOCUMENTS_PER_BATCH):
            for piece in encode(tokenizer, documents_of(texts)):
                packer.add(piece)
            rows = pa.array(list(packer.rows()), schema.field(0).type)
            yield pa.record_batch([rows], schema=schema), len(texts["text"])

    return cached_table(
        cache / f"rows-{key}.arrow",
        schema,
        batches,
        content="tokens",
        num_documents=len(documents),
    )


def packed_rows(
    documents: Iterable[dict[str, Document]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sequence_length: int,
    packing: bool,
) -> Iterator[Row]:
    """Tokenise and pack documents lazily."""
    packer = Packer(sequence_length, end_of_text_id(tokenizer), packing=packing)
    for document in documents:
        for piece in encode(tokenizer, [document["text"]]):
            packer.add(piece)
        for ids in packer.rows():
            yield {"input_ids": ids}


def rows_in_whole_batches(num_rows: int, batch_size: int, sequence_length: int) -> int:
    """Round the number of rows down to whole batches, so that no step of an epoch has fewer rows.

    Raises:
        DataError: There are fewer rows than one batch.
    """
    if num_rows < batch_size:
        raise DataError(
            f"the training text has {num_rows} sequences of {sequence_length} tokens, fewer than "
            f"one batch of {batch_size}; add text, or lower data.sequence_length or "
            "data.batch_size"
        )
    return num_rows // batch_size * batch_size


def evenly_spaced(count: int, total: int) -> list[int]:
    """Choose `count` of `total` indices, each in the middle of an equal part."""
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def collate(rows: Sequence[Row], *, sequence_length: int, pad: int) -> dict[str, Tensor]:
    """Collate rows into a batch.

    Args:
        rows: B rows.
        sequence_length: S, the length to which shorter rows are padded.
        pad: The padding token.

    Returns:
        "input_ids" and "labels", both int64 (B, S). The labels are the same tokens, not shifted,
        and -100 for padding and where a row has that label.
    """
    input_ids = torch.full((len(rows), sequence_length), pad)
    labels = torch.full((len(rows), sequence_length), IGNORED)
    for index, row in enumerate(rows):
        ids = torch.as_tensor(row["input_ids"])
        input_ids[index, : len(ids)] = ids
        labels[index, : len(ids)] = torch.as_tensor(row["labels"]) if "labels" in row else ids
    return {"input_ids": input_ids, "labels": labels}

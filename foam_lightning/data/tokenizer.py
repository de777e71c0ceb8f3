"""The tokenizer: byte-level BPE trained on the training text, or one that exists already."""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from foam_lightning.data.cache import atomic_cache_path, cache_key, damaged
from foam_lightning.errors import DataError, first_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
_SPECIAL = [END_OF_TEXT, PAD]
_SMALLEST_VOCABULARY = 256 + len(_SPECIAL)  # every byte is a token of its own
_SAMPLE_CHARACTERS = 2**22
_SAMPLE_DOCUMENTS = 2**17
_PIECE_CHARACTERS = 2**18


class Piece(NamedTuple):
    """A stretch of a document's tokens.

    Attributes:
        ids: The tokens.
        starts: Whether the document starts here.
        ends: Whether the document ends here.
    """

    ids: list[int]
    starts: bool
    ends: bool


def build_tokenizer(
    name: str | None, *, vocab_size: int, documents: "Dataset | IterableDataset", cache: Path
) -> "PreTrainedTokenizerBase":
    """Train a tokenizer on the documents, or load an existing one.

    Args:
        name: A local folder or a name on the Hugging Face Hub; None trains byte-level BPE.
        vocab_size: The model's vocabulary: how many tokens to train, and the limit of what loads.
        documents: The training documents, with the column "text".
        cache: Where a trained tokenizer is kept.

    Raises:
        DataError: The tokenizer cannot be loaded, has more tokens than the model, or has no
            token for the end of a text.
    """
    if name is None:
        return _trained(documents, vocab_size, cache)
    tokenizer = _loaded(name)
    _check_fits(tokenizer, name, vocab_size)
    return tokenizer


def end_of_text(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Give the token that is put after each document."""
    token = tokenizer.eos_token_id
    if not isinstance(token, int):
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token (eos_token), which "
            "separates documents; set it in its tokenizer_config.json or choose another"
        )
    return token


def fingerprint_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Name what a tokenizer makes of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return cache_key(rules, tokenizer.eos_token_id)


def pad_id(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> int:
    """Choose the token that fills up short rows; the loss never sees it."""
    pad = tokenizer.pad_token_id
    # T5-like extras may lie above the model's vocabulary, and LLaMA has no pad token at all.
    return pad if isinstance(pad, int) and pad < vocab_size else end_of_text(tokenizer)


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Give the tokens that no text becomes."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}


def encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> Iterator[Piece]:
    """Turn documents into tokens, without any special token.

    A very long document comes in several pieces, cut after a line: its parts are encoded in
    parallel and a book of a gigabyte never lies in memory as tokens.
    """
    pieces = [piece for text in texts for piece in _cut(text)]
    start = 0
    while start < len(pieces):
        stop, size = start, 0
        while stop < len(pieces) and size < 16 * _PIECE_CHARACTERS:
            size += len(pieces[stop][0])
            stop += 1
        batch = pieces[start:stop]
        all_ids = _encode_batch(tokenizer, [text for text, _, _ in batch])
        for (_, starts, ends), ids in zip(batch, all_ids, strict=True):
            yield Piece(ids, starts, ends)
        start = stop


def _encode_batch(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    # "<|endoftext|>" spelled out in a text must not become the token that ends documents.
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    return [encoding.ids for encoding in encodings]


def _cut(text: str) -> Iterator[tuple[str, bool, bool]]:
    _require_text(text)
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        line_end = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1
        stop = line_end or start + _PIECE_CHARACTERS
        yield text[start:stop], start == 0, False
        start = stop
    yield text[start:], start == 0, True


def _require_text(text: object) -> None:
    """Refuse what a dataset may hold in place of a text: a number, or nothing."""
    if not isinstance(text, str):
        raise DataError(
            f"a document is {text!r:.40}, not a text; name the column that holds the text with "
            "data.text_column, or choose another dataset"
        )


def _trained(
    documents: "Dataset | IterableDataset", vocab_size: int, cache: Path
) -> "PreTrainedTokenizerBase":
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < _SMALLEST_VOCABULARY:
        raise DataError(
            f"a vocabulary of {vocab_size} is too small: bytes and special tokens alone are "
            f"{_SMALLEST_VOCABULARY}; raise model.vocab_size"
        )
    sample = list(_sample(documents))
    path = cache / f"tokenizer-{cache_key(1, tokenizers.__version__, vocab_size, sample)}.json"
    if not path.exists():
        with atomic_cache_path(path) as temporary:
            _train(sample, vocab_size).save(str(temporary))
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # what tokenizers raises is no more than that
        raise damaged(path, error) from error
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def _train(sample: list[str], vocab_size: int) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def _sample(documents: "Dataset | IterableDataset") -> Iterator[str]:
    from datasets import Dataset

    if isinstance(documents, Dataset):
        count = min(len(documents), _SAMPLE_DOCUMENTS)
        chosen = random.Random(0).sample(range(len(documents)), count)
        texts = (documents[index]["text"] for index in chosen)
    else:
        texts = (document["text"] for document in islice(documents, _SAMPLE_DOCUMENTS))
    left = _SAMPLE_CHARACTERS
    for text in texts:
        _require_text(text)
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _loaded(name: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False
        )
    except Exception as error:  # a broken tokenizer.json raises a plain Exception
        raise DataError(
            f"cannot load the tokenizer {name!r}: {first_line(error)}; give a folder that holds "
            "tokenizer.json, or the name of one on the Hugging Face Hub, with data.tokenizer"
        ) from error
    return tokenizer


def _check_fits(tokenizer: "PreTrainedTokenizerBase", name: str, vocab_size: int) -> None:
    # T5 numbers its sentinels <extra_id_*> above the vocabulary; text never becomes one of them.
    special = special_ids(tokenizer)
    largest = max(
        end_of_text(tokenizer),
        *(number for number in tokenizer.get_vocab().values() if number not in special),
    )
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer {name!r} has tokens up to {largest}, and the model's vocabulary of "
            f"{vocab_size} ends at {vocab_size - 1}; set model.vocab_size to at least "
            f"{largest + 1}, or with model.pretrained take the tokenizer of that folder"
        )

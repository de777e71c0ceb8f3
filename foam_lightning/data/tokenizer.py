"""Train a byte-level BPE tokenizer or load an existing one, and encode documents."""

import random
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from foam_lightning.data.cache import atomic_cache_path, cache_key, damaged
from foam_lightning.data.files import Document
from foam_lightning.data.saved import load_saved_tokenizer
from foam_lightning.errors import DataError, first_line
from foam_lightning.storage.paths import is_file

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from foam_lightning.data.table import Table

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
_SPECIAL = [END_OF_TEXT, PAD]
_MIN_VOCABULARY = 256 + len(_SPECIAL)  # every byte is a token
_SAMPLE_CHARACTERS = 2**22
_SAMPLE_DOCUMENTS = 2**17
_PIECE_CHARACTERS = 2**18


class Piece(NamedTuple):
    """Consecutive tokens of a document.

    Attributes:
        ids: Token ids.
        starts: Whether this is the first piece of the document.
        ends: Whether this is the last piece of the document.
    """

    ids: list[int]
    starts: bool
    ends: bool


def build_tokenizer(
    name: str | None,
    *,
    vocab_size: int,
    documents: "Table | Dataset | IterableDataset",
    cache: Path,
) -> "PreTrainedTokenizerBase":
    """Train a tokenizer on the documents, or load an existing one.

    Args:
        name: As for `load_tokenizer`; None trains byte-level BPE.
        vocab_size: Vocabulary of the model: the number of tokens to train, or the maximum that an
            existing tokenizer may have.
        documents: The training documents, with the column "text".
        cache: Folder in which a trained tokenizer is cached.

    Raises:
        DataError: The tokenizer cannot be loaded, has more tokens than the model, or has no
            end-of-text token.
    """
    if name is None:
        return _train_or_load_cached(documents, vocab_size, cache)
    tokenizer = load_tokenizer(name)
    _check_fits(tokenizer, name, vocab_size)
    return tokenizer


def end_of_text_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token that is appended to each document.

    Raises:
        DataError: The tokenizer has none.
    """
    token = tokenizer.eos_token_id
    if not isinstance(token, int):
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token (eos_token) to "
            "separate documents; set it in its tokenizer_config.json, or choose another tokenizer"
        )
    return token


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a cache key that changes whenever the tokenizer may encode text differently."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Without a backend the rules are code, which the class and its arguments determine.
    slow = [
        type(tokenizer).__name__,
        str(tokenizer.init_kwargs),
        sorted(tokenizer.get_vocab().items()),
    ]
    rules = slow if backend is None else backend.to_str()
    return cache_key(rules, tokenizer.eos_token_id)


def count_other_ids(tokenizer: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> int:
    """Count the tokens of a tokenizer to which another one gives no id, or another id."""
    ids = other.get_vocab()
    return sum(ids.get(token) != own for token, own in tokenizer.get_vocab().items())


def pad_id(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> int:
    """Return the token that pads short rows; the loss ignores it."""
    pad = tokenizer.pad_token_id
    # LLaMA has no pad token, and that of other tokenizers may exceed the vocabulary of the model.
    return pad if isinstance(pad, int) and pad < vocab_size else end_of_text_id(tokenizer)


def special_token_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the special tokens, which text is never encoded to."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}


def encode(tokenizer: "PreTrainedTokenizerBase", documents: Sequence[Document]) -> Iterator[Piece]:
    """Encode documents, without special tokens; token ids are only checked.

    A long text yields several pieces, split after a line, so that it is encoded in parallel and the
    tokens of a file of gigabytes are never in memory together.

    Raises:
        DataError: A document is neither, or has an id that is not one of the tokenizer.
    """
    for is_ids, group in groupby(documents, lambda document: isinstance(document, list)):
        encode_group = _check_ids if is_ids else _encode_texts
        yield from encode_group(tokenizer, group)


def _check_ids(tokenizer: "PreTrainedTokenizerBase", documents: Iterable[Any]) -> Iterator[Piece]:
    largest, end = len(tokenizer) - 1, end_of_text_id(tokenizer)
    for ids in documents:
        if max(ids, default=0) > largest:
            raise DataError(
                f"a document has the token id {max(ids)}, but the tokenizer "
                f"{tokenizer.name_or_path!r} has ids up to {largest}; set data.tokenizer to the "
                "one that made the documents"
            )
        yield Piece(ids[:-1] if ids[-1:] == [end] else ids, starts=True, ends=True)


def _encode_texts(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[Any]) -> Iterator[Piece]:
    pieces = [piece for text in texts for piece in _split(text)]
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
    # The text "<|endoftext|>" must not be encoded as the token that ends documents.
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    return [encoding.ids for encoding in encodings]


def _split(text: str) -> Iterator[tuple[str, bool, bool]]:
    _require_text(text)
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        line_end = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1
        stop = line_end or start + _PIECE_CHARACTERS
        yield text[start:stop], start == 0, False
        start = stop
    yield text[start:], start == 0, True


def _require_text(text: object) -> None:
    """Check that a document is a string: a dataset may have numbers or None."""
    if not isinstance(text, str):
        raise DataError(
            f"a document is {text!r:.40}, not a string; set data.text_column to the column with "
            "the text, or choose another dataset"
        )


def _train_or_load_cached(
    documents: "Table | Dataset | IterableDataset", vocab_size: int, cache: Path
) -> "PreTrainedTokenizerBase":
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < _MIN_VOCABULARY:
        raise DataError(
            f"model.vocab_size {vocab_size} is too small: bytes and special tokens need "
            f"{_MIN_VOCABULARY}; set at least that"
        )
    sample = list(_sample(documents))
    path = cache / f"tokenizer-{cache_key(1, tokenizers.__version__, vocab_size, sample)}.json"
    if not path.exists():
        with atomic_cache_path(path) as temporary:
            _train(sample, vocab_size).save(str(temporary))
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
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


def _sample(documents: "Table | Dataset | IterableDataset") -> Iterator[str]:
    if hasattr(documents, "__len__"):  # not a stream
        count = min(len(documents), _SAMPLE_DOCUMENTS)
        chosen = random.Random(0).sample(range(len(documents)), count)
        texts = (documents[index]["text"] for index in chosen)
    else:
        texts = (document["text"] for document in islice(documents, _SAMPLE_DOCUMENTS))
    left = _SAMPLE_CHARACTERS
    for text in texts:
        if text is None or isinstance(text, list):
            raise DataError(
                "the files have token ids, not text to train a tokenizer on; set data.tokenizer to "
                "the tokenizer that made them"
            )
        _require_text(text)
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer.

    Args:
        name: A local folder, a checkpoint, or a name on the Hugging Face Hub.

    Raises:
        DataError: It cannot be loaded.
        CheckpointError: The checkpoint has no tokenizer that can be loaded.
    """
    if is_file(Path(name)):
        return load_saved_tokenizer(Path(name))
    _require_sentencepiece(Path(name))
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False
        )
    except Exception as error:  # a broken tokenizer.json raises a plain Exception
        raise DataError(
            f"cannot load the tokenizer {name!r}: {first_line(error)}; set data.tokenizer to a "
            "folder with tokenizer.json, or to a name on the Hugging Face Hub"
        ) from error
    return tokenizer


def _require_sentencepiece(folder: Path) -> None:
    """Refuse a folder like that of LLaMA 2 from Meta, unless the package that reads it is there.

    transformers itself would ask for another package, which reads the model of LLaMA 3.
    """
    is_only = is_file(folder / "tokenizer.model") and not is_file(folder / "tokenizer.json")
    if is_only and find_spec("sentencepiece") is None:
        raise DataError(
            f"the tokenizer {str(folder)!r} is a sentencepiece model without a tokenizer.json; "
            "to read it, pip install sentencepiece, or set data.tokenizer to another"
        )


def _check_fits(tokenizer: "PreTrainedTokenizerBase", name: str, vocab_size: int) -> None:
    # T5 numbers its special tokens <extra_id_*> above the vocabulary; they never appear in text.
    special = special_token_ids(tokenizer)
    largest = max(
        end_of_text_id(tokenizer),
        *(number for number in tokenizer.get_vocab().values() if number not in special),
    )
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer {name!r} has token ids up to {largest}, but model.vocab_size is "
            f"{vocab_size}; set model.vocab_size to at least {largest + 1}, or with "
            "model.pretrained use the tokenizer of that folder"
        )

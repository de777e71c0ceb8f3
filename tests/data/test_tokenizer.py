import json

import huggingface_hub.constants
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foam_lightning.data import tokenizer as module
from foam_lightning.data.table import Table
from foam_lightning.data.tokenizer import build_tokenizer, encode, end_of_text_id, pad_id
from foam_lightning.errors import DataError

TEXTS = [f"def name_{index}(value):\n    return value + {index}\n" for index in range(200)]


def build(cache, name=None, vocab_size=300):
    documents = Table.from_texts(TEXTS)
    return build_tokenizer(name, vocab_size=vocab_size, documents=documents, cache=cache)


def save_words(folder, num_words, **special):
    """Save a tokenizer of whole words, numbered from 0, special tokens after them."""
    words = {f"w{index}": index for index in range(num_words)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return str(folder)


def test_a_trained_tokenizer_has_the_size_and_the_special_tokens(tmp_path):
    tokenizer = build(tmp_path)
    assert len(tokenizer) == 300
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert end_of_text_id(tokenizer) == 0
    assert pad_id(tokenizer, 300) == 1


@pytest.mark.parametrize(
    "text", [" two  spaces , and\ttabs\r\n", "caf\u00e9 \U0001f600", "\x00\x01"]
)
def test_decoding_restores_the_text(tmp_path, text):
    tokenizer = build(tmp_path)
    (piece,) = encode(tokenizer, [text])
    assert tokenizer.decode(piece.ids) == text


def test_training_is_deterministic_and_cached(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    first, second = build(tmp_path), build(tmp_path / "other")
    assert first.get_vocab() == second.get_vocab()
    monkeypatch.setattr(module, "_train", None)  # a call would fail
    assert build(tmp_path).get_vocab() == first.get_vocab()
    monkeypatch.undo()
    assert len(build(tmp_path, vocab_size=290)) == 290  # another size is another tokenizer


def test_a_tokenizer_trains_on_a_stream(tmp_path):
    documents = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    tokenizer = build_tokenizer(None, vocab_size=300, documents=documents, cache=tmp_path)
    assert len(tokenizer) == 300


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"model\.vocab_size 257 .*258"):
        build(tmp_path, vocab_size=257)


def test_the_text_of_a_special_token_is_encoded_as_text(tmp_path):
    tokenizer = build(tmp_path)
    (piece,) = encode(tokenizer, ["a<|endoftext|>b"])
    assert end_of_text_id(tokenizer) not in piece.ids
    assert end_of_text_id(tokenizer) in tokenizer("a<|endoftext|>b")["input_ids"]


def test_long_documents_are_split_after_a_line(tmp_path, monkeypatch):
    tokenizer = build(tmp_path)
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 100)
    long, endless = "a line of text\n" * 300, "x" * 250
    pieces = list(encode(tokenizer, [long, "short", endless]))
    assert [sum(piece.starts for piece in pieces), sum(piece.ends for piece in pieces)] == [3, 3]
    ids = [token for piece in pieces for token in piece.ids]
    assert tokenizer.decode(ids) == long + "short" + endless
    assert tokenizer.decode(pieces[0].ids).endswith("\n")
    assert pieces[0].starts
    assert pieces[-1].ends


def test_loading_from_a_folder(tmp_path):
    build(tmp_path).save_pretrained(tmp_path / "saved")
    loaded = build(tmp_path, str(tmp_path / "saved"))
    assert loaded.get_vocab() == build(tmp_path).get_vocab()
    assert (end_of_text_id(loaded), pad_id(loaded, 300)) == (0, 1)


def test_more_tokens_than_the_model_has_are_refused(tmp_path):
    folder = save_words(tmp_path / "words", 50, eos_token="w1")
    assert len(build(tmp_path, folder, vocab_size=50)) == 50
    with pytest.raises(DataError, match=r"ids up to 49, .*is 49; .*at least 50"):
        build(tmp_path, folder, vocab_size=49)


def test_special_tokens_above_the_vocabulary_are_allowed(tmp_path):
    folder = save_words(
        tmp_path / "words",
        50,
        eos_token="w1",
        pad_token="<pad>",
        additional_special_tokens=["<extra_id_0>", "<extra_id_1>"],
    )
    tokenizer = build(tmp_path, folder, vocab_size=50)
    assert len(tokenizer) > 50
    assert pad_id(tokenizer, 50) == end_of_text_id(tokenizer) == 1
    (piece,) = encode(tokenizer, ["w7 <extra_id_0> w9"])
    assert max(piece.ids) < 50


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    folder = save_words(tmp_path / "words", 50)
    with pytest.raises(DataError, match="eos_token"):
        build(tmp_path, folder, vocab_size=50)


@pytest.mark.parametrize("content", [None, "not json", "offline"])
def test_a_tokenizer_that_cannot_be_loaded_is_named_in_one_line(tmp_path, content, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    if content:
        (folder / "tokenizer.json").write_text(content)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    name = "nobody/nothing" if content == "offline" else str(folder)
    with pytest.raises(DataError, match=rf"cannot load the tokenizer '{name}'") as caught:
        build(tmp_path, name)
    assert "\n" not in str(caught.value)


# ---- sentencepiece


def save_sentencepiece(folder):
    """Save a tokenizer as Meta ships that of LLaMA 2: a sentencepiece model alone."""
    trainer = pytest.importorskip("sentencepiece", reason="pip install sentencepiece")
    folder.mkdir(parents=True)
    trainer.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "tokenizer"), vocab_size=400,
        model_type="bpe", byte_fallback=True, minloglevel=9, add_dummy_prefix=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    content = {"tokenizer_class": "LlamaTokenizer", **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return trainer.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_a_sentencepiece_model_alone_encodes_as_that_package_does(tmp_path):
    processor = save_sentencepiece(tmp_path / "folder")
    tokenizer = build(tmp_path, str(tmp_path / "folder"), vocab_size=400)
    assert end_of_text_id(tokenizer) == processor.eos_id() == 2
    for text in [*TEXTS[:3], "two  spaces", "snow \u2603 and \U0001f600", "tab\tend\n"]:
        (piece,) = encode(tokenizer, [text])
        assert piece.ids == processor.encode(text)
        assert tokenizer.decode(piece.ids) == text
    tokenizer.save_pretrained(tmp_path / "exported")
    again = build(tmp_path, str(tmp_path / "exported"), vocab_size=400)
    assert list(encode(again, TEXTS)) == list(encode(tokenizer, TEXTS))


def test_without_the_package_a_sentencepiece_model_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15")
    monkeypatch.setattr(module, "find_spec", lambda _name: None)
    with pytest.raises(DataError, match="pip install sentencepiece") as caught:
        build(tmp_path, str(tmp_path / "folder"))
    assert "tiktoken" not in str(caught.value)

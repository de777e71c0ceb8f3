import json

import pytest

from foam_lightning.data.chat import PLAIN_TEMPLATE, ChatText, encode_chat
from foam_lightning.data.conversations import Conversation
from foam_lightning.data.module import TextData
from foam_lightning.data.packing import IGNORED
from foam_lightning.errors import ConfigError, DataError
from tests.support.pretrained import CHAT_TEMPLATE, load_tokenizer, save_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "Now it is 6."},
    {"role": "user", "content": "Thanks."},
]
# Changes answers once another message follows, as templates that remove reasoning do.
FORGETFUL = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{{ message['content'] if loop.last or message['role'] == 'user' else '...' }}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, template=CHAT_TEMPLATE)
    return folder


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(folder)


def learned(tokenizer, labels):
    """Decode every run of tokens that has labels."""
    texts = [[]]
    for label in labels:
        if label != IGNORED:
            texts[-1].append(label)
        elif texts[-1]:
            texts.append([])
    return [str(tokenizer.decode(ids)) for ids in texts if ids]


def test_only_messages_of_the_assistant_have_labels(tokenizer):
    ids, labels = encode_chat(tokenizer, Conversation(TALK), "here")
    assert learned(tokenizer, labels) == ["It is 4.<|end|>\n", "Now it is 6.<|end|>\n"]
    whole = tokenizer.apply_chat_template(TALK[:5], return_dict=False)
    assert ids == whole
    assert [i for i, label in zip(ids, labels, strict=True) if label not in (i, IGNORED)] == []


def test_the_plain_template(tokenizer):
    tokenizer.chat_template = PLAIN_TEMPLATE
    ids, labels = encode_chat(tokenizer, Conversation(TALK), "here")
    assert learned(tokenizer, labels) == ["It is 4.</s>", "Now it is 6.</s>"]
    assert tokenizer.decode(ids) == (
        "<s>### System\nBe brief.\n\n### User\nWhat is 2 + 2?\n\n### Assistant\nIt is 4.</s>"
        "### User\nAnd 3 + 3?\n\n### Assistant\nNow it is 6.</s>"
    )


def write_lines(path, lines):
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts))
    return str(path)


def prompts(number):
    return [{"prompt": f"{i} + {i}?", "response": f"{2 * i}."} for i in range(number)]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (FORGETFUL, r"here: .*template changes .*message 5"),
        ("{{ raise_exception('no system') }}", r"here: .*template fails \(no system"),
    ],
    ids=["forgetful", "refusing"],
)
def test_a_template_that_does_not_separate_responses_is_refused(template, message, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=message):
        encode_chat(tokenizer, Conversation(TALK), "here")


@pytest.fixture
def chat(folder, tmp_path):
    def make(lines, **settings):
        own = {"files": [write_lines(tmp_path / "chat.jsonl", lines)], "tokenizer": str(folder)}
        own |= {"chat": True, "vocab_size": 320, "sequence_length": 40, "batch_size": 4}
        return TextData(**own | {"cache_dir": str(tmp_path / "cache")} | settings)

    return make


def test_conversations_are_padded_rows(chat, tokenizer):
    data = chat(prompts(47))
    data.setup()
    batches = list(data.train_dataloader())
    assert len(batches) == 45 // 4
    assert sum(len(batch["labels"]) for batch in data.val_dataloader()) == 2
    for batch in batches:
        assert batch["input_ids"].shape == batch["labels"].shape == (4, 40)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            (response,) = learned(tokenizer, labels.tolist())
            question = str(tokenizer.decode(ids)).split("\n")[1].split(" ")[0]
            assert response == f"{2 * int(question)}.<|end|>\n"


def test_long_conversations_are_truncated_and_counted(chat, capfd):
    far = {"prompt": "Why? " * 40, "response": "So."}
    wordy = {"prompt": "Why?", "response": "So. " * 40}
    data = chat([*prompts(21), far, wordy], batch_size=1)
    data.setup()
    warning = capfd.readouterr().err.splitlines()[0]
    assert warning.startswith("2 of 23 conversations are truncated to data.sequence_length 40; 1 ")
    assert isinstance(data._text, ChatText)
    assert max(len(row["input_ids"]) for row in data._text.train) == 40
    assert all((row["labels"][1:] != IGNORED).any() for row in data._text.train)


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        ([" "], {}, r"chat\.jsonl has no conversation"),
        (prompts(19), {}, r"19 conversations are too few .*5%"),
        (prompts(3) * 20, {"sequence_length": 4}, r"no conversation in .* within 4 tokens"),
        (prompts(23), {"batch_size": 50}, r"22 sequences .* one batch of 50"),
    ],
    ids=["blank", "nothing to validate on", "no response left", "no batch"],
)
def test_too_few_conversations_are_refused(lines, settings, message, chat):
    with pytest.raises(DataError, match=message):
        chat(lines, **settings).setup()


def test_other_files_and_settings_are_refused(chat, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("no conversation")
    with pytest.raises(DataError, match=r"text\.txt .*remove data\.chat"):
        chat(prompts(30), files=[str(text)]).setup()
    for settings in ({"tokenizer": None}, {"files": None}, {"streaming": True}):
        with pytest.raises(ConfigError, match=r"data\.chat needs data\.files"):
            chat(prompts(30), **settings)

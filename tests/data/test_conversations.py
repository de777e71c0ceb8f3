"""Conversations in every form that people bring, and what of them is learned."""

import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from foam_lightning.data.chat import PLAIN_TEMPLATE, encode_chat
from foam_lightning.data.conversations import IGNORED, Conversation, Tokens, read_conversations
from foam_lightning.data.module import TextData
from foam_lightning.errors import DataError
from tests.support.pretrained import CHAT_TEMPLATE, load_tokenizer, save_tokenizer

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
CALLS = [{"type": "function", "function": CALL}]
QUOTED = [{"type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}]
ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sun."}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL_TALK = [ASK, {"role": "assistant", "content": "", "tool_calls": CALLS},
             {"role": "tool", "content": "sun"}, ANSWER]  # fmt: skip
CHAT = [ASK, ANSWER]
FORMS = {
    "messages": ({"messages": CHAT}, CHAT),
    "messages and a system text": ({"system": "Be brief.", "messages": CHAT}, [SYSTEM, *CHAT]),
    "messages as JSON in a column": ({"messages": json.dumps(CHAT)}, CHAT),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, "i"]}, ANSWER]},
        CHAT,
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "Be brief."}, *CHAT]},
        [SYSTEM, *CHAT],
    ),
    "tools": (
        {"tools": [WEATHER], "messages": [ASK, {"role": "assistant", "content": None,
         "tool_calls": QUOTED}, {"role": "tool", "content": [{"type": "text", "text": "sun"}]},
         ANSWER]},
        TOOL_TALK,
    ),
    "ShareGPT": (
        {"conversations": [{"from": "system", "value": "Be brief."},
                           {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Sun."}]},
        [SYSTEM, *CHAT],
    ),
    "ShareGPT with roles": ({"conversations": CHAT}, CHAT),
    "ShareGPT with tools": (
        {"tools": json.dumps([WEATHER]), "conversations": [
            {"from": "human", "value": "Hi"}, {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "sun"}, {"from": "gpt", "value": "Sun."}]},
        TOOL_TALK,
    ),
    "Alpaca": ({"instruction": "Hi", "input": "", "output": "Sun."}, CHAT),
    "Alpaca without input": ({"instruction": "Hi", "output": "Sun."}, CHAT),
    "Alpaca with all": (
        {"instruction": "Hi", "input": "you", "output": "Sun.", "system": "Be brief.",
         "history": [["Hi", "Sun."]]},
        [SYSTEM, *CHAT, {"role": "user", "content": "Hi\n\nyou"}, ANSWER],
    ),
    "prompt and response": ({"prompt": "Hi", "response": "Sun."}, CHAT),
    "prompt and completion": ({"prompt": "Hi", "completion": "Sun."}, CHAT),
    "prompt and completion of turns": ({"prompt": [ASK], "completion": [ANSWER]}, CHAT),
}  # fmt: skip


def write(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def read(path):
    return [conversation for _, conversation in read_conversations(path)]


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_is_read_as_messages(kind, tmp_path):
    record, messages = FORMS[kind]
    (found,) = read(write(tmp_path / "a.jsonl", [record]))
    assert found.messages == messages
    assert found.tools == ([WEATHER] if "tools" in record else None)
    assert not found.ignored


def test_conversations_come_in_arrays_tables_and_packed(tmp_path):
    records = [record for record, _ in FORMS.values() if set(record) == {"messages", "tools"}]
    records += [{"messages": CHAT, "tools": None}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(records).encode()))
    texts = [{"role": m["role"], "content": str(m["content"] or "")} for m in TOOL_TALK]
    parquet.write_table(
        pa.Table.from_pylist([{"messages": texts, "id": 1}]), tmp_path / "a.parquet"
    )
    (tmp_path / "a.csv").write_text('instruction,output\n"Hi","Sun."\n')
    expected = [TOOL_TALK, CHAT]
    assert [one.messages for one in read(tmp_path / "a.json")] == expected
    assert [one.messages for one in read(tmp_path / "a.jsonl.gz")] == expected
    assert [one.messages for one in read(tmp_path / "a.parquet")] == [texts]
    assert [one.messages for one in read(tmp_path / "a.csv")] == [CHAT]


def test_a_table_has_no_keys_of_other_rows(tmp_path):
    other = [{"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}]
    talks = [[ASK, {"role": "assistant", "content": "", "tool_calls": calls}, ANSWER]
             for calls in (CALLS, other)]  # fmt: skip
    parquet.write_table(pa.table({"messages": talks}), tmp_path / "a.parquet")
    assert [one.messages for one in read(tmp_path / "a.parquet")] == talks


NOT = "line 3 is not a conversation in one form"
LAST = "line 3: message 2"
BROKEN = {
    "no JSON": ('{"prompt": ', "line 3 is not JSON"),
    "a list": ([1, 2], "line 3 is not a JSON object"),
    "no form": ({"question": "Hi", "answer": "Sun."}, f"{NOT}; its keys are question, answer"),
    "half a form": ({"prompt": "Hi"}, NOT),
    "two forms": ({"messages": CHAT, "conversations": CHAT}, NOT),
    "preferences": ({"prompt": "Hi", "chosen": "Sun.", "rejected": "No."}, NOT),
    "another form": ({"prompt": "Hi", "response": "Sun."}, "line 3 is in the form prompt and resp"),
    "no messages": ({"messages": []}, "line 3 needs a message of the assistant"),
    "messages of a number": ({"messages": 5}, "line 3: messages is int"),
    "messages of words": ({"messages": ["Hi"]}, "line 3: message 1 is not an object"),
    "messages of a text": ({"messages": "Hi"}, "line 3: messages is a text that is not JSON"),
    "a number": ({"messages": [ASK, {"role": "assistant", "content": 5}]}, f"{LAST} has no text"),
    "null": ({"messages": [ASK, {"role": "assistant", "content": None}]}, f"{LAST} has no text"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
        "message 1 has no text, but a part of type 'image'",
    ),
    "no answer": ({"messages": [ASK]}, "line 3 needs a message of the assistant"),
    "answer first": ({"messages": [ANSWER, ASK]}, "line 3 needs a message of the assistant"),
    "unknown role": ({"messages": [ASK, {"role": "judge", "content": ""}]}, f"{LAST} has the role"),
    "role of a list": ({"messages": [{"role": [], "content": ""}, ANSWER]}, "message 1 has the ro"),
    "half a weight": ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, f"{LAST} has the weight 0.5"),
    "tools of a number": ({"messages": CHAT, "tools": 5}, "line 3: tools is int"),
    "a call that is none": (
        {"messages": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "x"}]},
        f"{LAST} is a function_call, but not JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_record_is_named(kind, tmp_path):
    record, says = BROKEN[kind]
    lines = [json.dumps({"messages": CHAT})] * 2
    lines.append(record if isinstance(record, str) else json.dumps(record))
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read(path)
    assert says in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    if NOT in says:
        assert '{"instruction": ..., "input": ..., "output": ...}' in str(caught.value)


# ---- what is learned


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, template=CHAT_TEMPLATE)
    return folder


def learned(tokenizer, tokens):
    return tokenizer.decode([label for label in tokens.labels if label != IGNORED])


TOOLED = (
    "{{ 'TOOLS ' + (tools | tojson) if tools else 'NO TOOLS ' }}"
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% if m['tool_calls'] %}"
    "{{ m['tool_calls'][0]['function']['name'] }}{% endif %};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_message_with_weight_0_is_not_learned(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    turns = [ASK, {**ANSWER, "content": "No!", "weight": 0}, ASK, {**ANSWER, "weight": 1}]
    (found,) = read(write(tmp_path / "a.jsonl", [{"messages": turns}]))
    tokens = encode_chat(tokenizer, found, "here")
    assert learned(tokenizer, tokens) == "Sun.<|end|>\n"
    assert "No!" in tokenizer.decode(tokens.ids)


@pytest.mark.parametrize("template", [TOOLED, PLAIN_TEMPLATE])
def test_tools_and_calls_reach_the_template(template, folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    (found,) = read(write(tmp_path / "a.jsonl", [FORMS["tools"][0]]))
    tokens = encode_chat(tokenizer, found, "here")
    text = tokenizer.decode(tokens.ids)
    assert '"parameters"' in text
    assert "weather" in learned(tokenizer, tokens)
    assert "sun" in text
    assert "sun" not in learned(tokenizer, tokens)


@pytest.mark.parametrize("template", ["{0}{1}", "{0} {1}", "{0}\n\n{1}"])
def test_tokens_that_merge_across_the_boundary_do_not_matter(template, folder):
    """The text of the prompt begins that of the conversation, but its tokens need not."""
    tokenizer = load_tokenizer(folder)
    asked, answered = template.split("{1}")[0].split("{0}")[1], "{{ messages[1]['content'] }}"
    tokenizer.chat_template = (
        f"{{{{ messages[0]['content'] }}}}:{asked}"
        f"{{% if messages | length > 1 %}}{answered}</s>{{% endif %}}"
    )
    for answer in ("\n\n    return self", " a b", "self"):
        turns = [ASK, {"role": "assistant", "content": answer}]
        tokens = encode_chat(tokenizer, Conversation(turns), "here")
        text = tokenizer.decode(tokens.ids)
        assert text == f"Hi:{asked}{answer}</s>"
        found = learned(tokenizer, tokens)
        assert found.endswith(f"{answer}</s>")
        assert len(found) <= len(f"{asked}{answer}</s>")


def data(folder, files, tmp_path, **settings):
    return TextData(
        files=[str(file) for file in files], tokenizer=str(folder), chat=True, vocab_size=320,
        sequence_length=64, batch_size=2, cache_dir=str(tmp_path / "cache"), **settings,
    )  # fmt: skip


LEFT_OUT = {
    "tools": ({"messages": CHAT, "tools": [WEATHER]}, "leaves out the tools"),
    "calls": ({"messages": [ASK, {**ANSWER, "tool_calls": CALLS}]}, "leaves out the tool_calls"),
    "reasoning": (
        {"messages": [ASK, {**ANSWER, "reasoning_content": "Hm."}]},
        "leaves out the reasoning_content of a message of the role assistant",
    ),
    "a role": (
        {"messages": [SYSTEM, *CHAT]},
        "leaves out the content of a message of the role system",
    ),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_the_template_leaves_out_is_refused(kind, tmp_path):
    record, says = LEFT_OUT[kind]
    no_system = "{% for message in messages if message['role'] != 'system' %}"
    template = CHAT_TEMPLATE.replace("{% for message in messages %}", no_system)
    save_tokenizer(tmp_path / "tokenizer", template=template)
    path = write(tmp_path / "a.jsonl", [record] * 60)
    with pytest.raises(DataError, match=rf"line 1: .*{says}"):
        data(tmp_path / "tokenizer", [path], tmp_path).setup()


def test_the_form_and_the_keys_not_used_are_named_once(folder, tmp_path, capfd):
    turns = [ASK, {**ANSWER, "train": False}]
    files = [
        write(tmp_path / "a.jsonl", [{"messages": turns, "id": i} for i in range(60)]),
        write(tmp_path / "b.jsonl", [FORMS["Alpaca"][0]] * 60),
    ]
    for _ in range(2):
        data(folder, files, tmp_path).setup()
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].endswith("has keys that are not used: id, train of a message")
    assert ["messages" in lines[1], "Alpaca" in lines[2]] == [True, True]
    assert len(lines) == 3


def test_conversations_without_data_chat_are_recognised(folder, tmp_path):
    path = write(tmp_path / "a.jsonl", [FORMS["ShareGPT"][0]])
    text = TextData(files=[str(path)], cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"conversations \(ShareGPT\), set data\.chat true"):
        text.setup()


def test_token_ids_keep_their_labels(folder, tmp_path):
    record = {
        "input_ids": [5, 6, 7, 0],
        "labels": [-100, 6, 7, -100],
        "attention_mask": [1, 1, 1, 0],
    }
    path = write(tmp_path / "a.jsonl", [record] * 60)
    assert read(path)[0] == Tokens([5, 6, 7], [-100, 6, 7])
    module = data(folder, [path], tmp_path)
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert batch["labels"][0][:4].tolist() == [-100, 6, 7, -100]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"input_ids": [5, 6], "labels": [6, -100]}, "do not shift"),
        ({"input_ids": [5], "labels": [5, 6]}, "1 input_ids, 2 labels"),
        ({"input_ids": ["a"], "labels": [5]}, "lists of integers"),
        ({"input_ids": 5, "labels": [5]}, "lists of integers"),
        ({"input_ids": [5, 320], "labels": [5, 320]}, "token id 320, .* 0 to 319"),
    ],
    ids=str,
)
def test_bad_token_ids_are_named(record, says, folder, tmp_path):
    path = write(tmp_path / "a.jsonl", [record] * 60)
    with pytest.raises(DataError, match=rf"line 1\b.*{says}"):
        data(folder, [path], tmp_path).setup()

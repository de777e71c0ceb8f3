"""Conversations in the forms in which people write them, read as messages for a chat template."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from foam_lightning.data.records import Record, read_records
from foam_lightning.errors import DataError

Message = dict[str, Any]
IGNORED = -100  # label that the loss ignores

ROLES = ("system", "user", "assistant", "tool")
"""Roles of a conversation; for those of matrices see `model.roles`."""
_CALL = "function_call"  # ShareGPT's turn whose text is a call, as JSON
_ROLE_NAMES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("developer",), "system"),
    **dict.fromkeys(("function", "observation", "function_response"), "tool"),
    _CALL: _CALL,
}
# Keys of a message that chat templates read, besides role and content.
_TEMPLATE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content")


class Conversation(NamedTuple):
    """A conversation.

    Attributes:
        messages: Each with "role" and "content", a text, and what else chat templates read.
        tools: Descriptions of tools for the chat template.
        not_learned: Indices of messages of the assistant with weight 0.
        ignored: Names of the values of the record that mean nothing here.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    not_learned: frozenset[int] = frozenset()
    ignored: frozenset[str] = frozenset()


class Tokens(NamedTuple):
    """A conversation that is encoded already.

    Attributes:
        ids: Its tokens.
        labels: The same tokens where they are learned; -100 elsewhere.
    """

    ids: list[int]
    labels: list[int]


class Form(NamedTuple):
    """A form of records.

    Attributes:
        name: What it is called.
        example: A record.
        required: The keys that tell it from other forms.
        allowed: The other keys that it may have.
        read: Reads the turns of a record; each has the keys of `_Turn`, or "from" and "value".
    """

    name: str
    example: str
    required: frozenset[str]
    allowed: frozenset[str]
    read: Callable[[Mapping[str, Any], str], list[Any]]


def _read_turns(key: str) -> Callable[[Mapping[str, Any], str], list[Any]]:
    return lambda values, location: _parse_list(values[key], location, key)


def _read_alpaca(values: Mapping[str, Any], location: str) -> list[Any]:
    past = _parse_list(values.get("history") or [], location, "history")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in past):
        raise DataError(f"{location}: history must be a list of pairs [question, answer]")
    request = [values["instruction"], values.get("input") or None]
    if not all(part is None or isinstance(part, str) for part in request):
        raise DataError(f"{location}: instruction and input must be texts")
    turns = [
        _turn(role, text) for pair in past for role, text in zip(ROLES[1:3], pair, strict=True)
    ]
    asked = "\n\n".join(part for part in request if part is not None)
    return [*turns, _turn("user", asked), _turn("assistant", values["output"])]


def _read_pair(answer: str) -> Callable[[Mapping[str, Any], str], list[Any]]:
    def read(values: Mapping[str, Any], _location: str) -> list[Any]:
        sides = (("user", values["prompt"]), ("assistant", values[answer]))
        is_turns = all(isinstance(side, list) and _is_turns(side) for _, side in sides)
        if is_turns:
            return [turn for _, side in sides for turn in side]
        return [_turn(role, side) for role, side in sides]

    return read


def _is_turns(side: list[Any]) -> bool:
    return all(isinstance(turn, dict) and "role" in turn for turn in side)


def _turn(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _form(
    name: str, example: str, required: str, allowed: str, read: Callable[..., list[Any]]
) -> Form:
    return Form(name, example, frozenset(required.split()), frozenset(allowed.split()), read)


FORMS = (
    _form("messages", '{"messages": [{"role": ..., "content": ...}, ...]}',
          "messages", "tools system", _read_turns("messages")),
    _form("ShareGPT", '{"conversations": [{"from": ..., "value": ...}, ...]}',
          "conversations", "tools system", _read_turns("conversations")),
    _form("Alpaca", '{"instruction": ..., "input": ..., "output": ...}',
          "instruction output", "input history tools system", _read_alpaca),
    _form("prompt and completion", '{"prompt": ..., "completion": ...}',
          "prompt completion", "tools system", _read_pair("completion")),
    _form("prompt and response", '{"prompt": ..., "response": ...}',
          "prompt response", "tools system", _read_pair("response")),
    _form("token ids", '{"input_ids": [...], "labels": [...]}',
          "input_ids labels", "attention_mask", lambda *_: []),
)  # fmt: skip


def find_form(names: Collection[str]) -> Form | None:
    """Return the form of a record with these keys; None if it is none, or several."""
    found = [form for form in FORMS if form.required <= set(names)]
    return found[0] if len(found) == 1 else None


def form_of(path: Path) -> Form | None:
    """Return the form of the first record of a file; None if it has no record.

    Raises:
        DataError: The file cannot be read, or the record is in no form.
    """
    return _form_of(path, path.stat().st_mtime_ns)


@cache  # an array in a .json file is parsed as a whole
def _form_of(path: Path, _: int) -> Form | None:
    first = next(read_records(path), None)
    return None if first is None else _require_form(first)


def read_conversations(path: Path) -> Iterator[tuple[str, Conversation | Tokens]]:
    """Read the conversations of a file, each with its file and line for errors.

    Raises:
        DataError: The file is unreadable, or a record is not a conversation, or not in the form of
            the first one.
    """
    form: Form | None = None
    for record in read_records(path):
        found = _require_form(record)
        if form is not None and form != found:
            raise DataError(
                f"{record.location} is in the form {found.name} ({found.example}), and those "
                f"before it are in the form {form.name} ({form.example}); use one form a file"
            )
        form = found
        is_tokens = "input_ids" in form.required
        yield record.location, _read_tokens(record) if is_tokens else _read(form, record)


def _require_form(record: Record) -> Form:
    form = find_form(record.names)
    if form is None:
        keys = ", ".join(record.names) or "none"
        raise DataError(
            f"{record.location} is not a conversation in one form; its keys are {keys:.200}; write "
            f"{' or '.join(form.example for form in FORMS)}"
        )
    return form


def _read(form: Form, record: Record) -> Conversation:
    values, location = record.values, record.location
    missing = form.required - values.keys()
    if missing:  # null in a table
        raise DataError(f"{location} has no {min(missing)}; write {form.example}")
    turns = form.read(values, location)
    if values.get("system"):
        turns = [_turn("system", values["system"]), *turns]
    given = {name for name, value in values.items() if value is not None}
    ignored = given - form.required - form.allowed
    messages: list[Message] = []
    not_learned = set()
    for number, turn in enumerate(turns, start=1):
        message, weight, others = _read_turn(turn, f"{location}: message {number}")
        not_learned |= {number - 1} if weight == 0 else set()
        messages.append(message)
        ignored |= {f"{name} of a message" for name in others}
    _check_roles([message["role"] for message in messages], location)
    tools = _parse_list(values.get("tools") or [], location, "tools") or None
    return Conversation(messages, tools, frozenset(not_learned), frozenset(ignored))


def _read_turn(turn: Any, location: str) -> tuple[Message, float, set[str]]:
    """Read a turn: the message, its weight, and its keys that mean nothing here."""
    if not isinstance(turn, dict):
        raise DataError(f"{location} is not an object; write {FORMS[0].example}")
    named, text = ("from", "value") if "from" in turn else ("role", "content")
    role = _ROLE_NAMES.get(turn[named]) if isinstance(turn.get(named), str) else None
    if role is None:
        raise DataError(
            f"{location} has the role {turn.get(named)!r}; use {', '.join(ROLES)}, or of ShareGPT "
            "human, gpt, function_call, observation"
        )
    used = {key: turn[key] for key in _TEMPLATE_KEYS if turn.get(key)}
    content = turn.get(text)
    if role == _CALL:
        used["tool_calls"] = [{"type": "function", "function": _parse_call(content, location)}]
        role, content = "assistant", None
    elif "tool_calls" in used:
        calls = _parse_list(used["tool_calls"], location, "tool_calls")
        used["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    if content is None and (role == "tool" or "tool_calls" in used):
        content = ""
    weight = 1 if turn.get("weight") is None else turn["weight"]
    if weight not in (0, 1):
        raise DataError(f"{location} has the weight {weight!r}; use 1, or 0 not to learn it")
    message = {"role": role, "content": _read_content(content, location), **used}
    given = {key for key, value in turn.items() if value is not None}
    return message, weight, given - {named, text, "weight", *_TEMPLATE_KEYS}


def _read_content(content: Any, location: str) -> str:
    parts = content if isinstance(content, list) else [content]
    texts = [_read_part(part, location) for part in parts]
    return "".join(texts)


def _read_part(part: Any, location: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text":
        part = part.get("text")
    if isinstance(part, str):
        return part
    kind = f"a part of type {part.get('type')!r}" if isinstance(part, dict) else f"{part!r:.40}"
    raise DataError(f"{location} has no text, but {kind}; only text can be learned")


def _parse_list(value: Any, location: str, name: str) -> list[Any]:
    """Return a list that may be written as JSON, as in a column of a table."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{location}: {name} is a text that is not JSON ({error})") from error
    if not isinstance(value, list):
        raise DataError(f"{location}: {name} is {type(value).__name__}, not a list")
    return value


def _parse_call(content: Any, location: str) -> dict[str, Any]:
    try:
        call = json.loads(content)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{location} is a function_call, but not JSON ({error})") from error
    if not isinstance(call, dict) or "name" not in call:
        raise DataError(f'{location} is a function_call without "name" in its JSON')
    return call


def _with_parsed_arguments(call: Any) -> Any:
    """Parse arguments that are JSON, as OpenAI writes them: templates write them as JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _check_roles(roles: list[str], location: str) -> None:
    if "assistant" not in roles or roles[0] == "assistant":
        raise DataError(
            f"{location} needs a message of the assistant after another message; its roles are "
            f"{', '.join(roles) or 'none'}"
        )


def _read_tokens(record: Record) -> Tokens:
    lists: tuple[Any, ...]
    ids, labels, mask = lists = tuple(
        record.values.get(name, []) for name in ("input_ids", "labels", "attention_mask")
    )
    if not all(isinstance(one, list) and all(type(n) is int for n in one) for one in lists):
        raise DataError(f"{record.location}: input_ids and labels must be lists of integers")
    mask = mask or [1] * len(ids)
    if not len(ids) == len(labels) == len(mask):
        raise DataError(
            f"{record.location} has {len(ids)} input_ids, {len(labels)} labels and {len(mask)} "
            "values of attention_mask; they must be equally many"
        )
    rows = [row[:2] for row in zip(ids, labels, mask, strict=True) if row[2]]
    if any(label not in (token, IGNORED) for token, label in rows):
        raise DataError(
            f"{record.location}: a label must be its token id, or {IGNORED} where it is not "
            "learned; do not shift them"
        )
    return Tokens([token for token, _ in rows], [label for _, label in rows])

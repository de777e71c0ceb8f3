"""Conversations as rows of tokens whose loss covers only the assistant's messages."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from foam_lightning.data.cache import cache_key, cached_table
from foam_lightning.data.conversations import (
    IGNORED,
    Conversation,
    Tokens,
    form_of,
    read_conversations,
)
from foam_lightning.data.files import files_fingerprint
from foam_lightning.data.loader import EpochSampler
from foam_lightning.data.notices import print_once
from foam_lightning.data.packing import evenly_spaced, rows_in_whole_batches
from foam_lightning.data.records import format_of, list_files, name_files
from foam_lightning.data.sources import VALIDATION_FRACTION
from foam_lightning.data.tokenizer import special_token_ids, tokenizer_fingerprint
from foam_lightning.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from foam_lightning.data.table import Table

PLAIN_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}"
    "{% if tools %}### Tools\n{{ tools | tojson }}\n\n{% endif %}{% for message in messages %}"
    "### {{ message['role'] | capitalize }}\n{{ message['content'] | trim }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Assistant\n{% endif %}"
)
"""Chat template for tokenizers without one: "### User", the message on the next line, an empty
line, "### Assistant", and on the next line the answer, which ends with the end-of-text token. It
is exported with the tokenizer."""
_CONVERSATIONS_PER_BATCH = 256
_WRITTEN_KEYS = ("content", "tool_calls", "reasoning_content")  # what a model is to read or write


class ChatText:
    """Rows of one conversation each, in memory-mapped files.

    Args:
        files: Conversations, one per record, each file in one of the `FORMS`. A message of the
            assistant with weight 0 is not learned; tools are for the chat template.
        validation_files: Validation conversations; None holds out 5 percent of `files`.
        tokenizer: Its chat template is used; without one it gets `PLAIN_TEMPLATE`.
        sequence_length: Longer conversations are truncated to this number of tokens.
        batch_size: Rows in an optimizer step; an epoch is a whole number of steps.
        validation_sequences: Number of validation rows, at most.
        cache: Folder in which the rows are cached.

    Attributes:
        train: Rows with "input_ids" and "labels".
        validation: Rows held out for validation.

    Raises:
        DataError: A record is not a conversation, the template leaves out a part of one or does not
            separate responses, or there are too few conversations.
    """

    def __init__(
        self,
        files: list[str] | str,
        validation_files: list[str] | str | None,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        sequence_length: int,
        batch_size: int,
        validation_sequences: int,
        cache: Path,
    ) -> None:
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN_TEMPLATE
        paths = list_files(files)
        train = chat_dataset(paths, tokenizer, sequence_length, cache)
        if validation_files is None:
            count = int(len(train) * VALIDATION_FRACTION)
            if count == 0:
                raise DataError(
                    f"{len(train)} conversations are too few to hold out {VALIDATION_FRACTION:.0%} "
                    "for validation; set data.validation_files, or add conversations"
                )
            held_out = evenly_spaced(count, len(train))
            validation = train.select(held_out)
            train = train.select(sorted(set(range(len(train))) - set(held_out)))
        else:
            held_out_paths = list_files(validation_files)
            paths += held_out_paths
            validation = chat_dataset(held_out_paths, tokenizer, sequence_length, cache)
        self.train = train.select(
            range(rows_in_whole_batches(len(train), batch_size, sequence_length))
        )
        count = min(validation_sequences, len(validation))
        self.validation = validation.select(evenly_spaced(count, len(validation)))
        _print_forms(paths)

    def sampler(self, *, seed: int, world: int, rank: int) -> EpochSampler:
        """Create the sampler of the training rows.

        Args:
            seed: Determines the order, together with the epoch.
            world: Number of ranks.
            rank: This rank.
        """
        return EpochSampler(self.train, world, rank, seed=seed, drop_last=True)


def chat_dataset(
    files: Sequence[Path], tokenizer: "PreTrainedTokenizerBase", sequence_length: int, cache: Path
) -> "Table":
    """Create a row of every conversation with a response within the length, and warn of others.

    Raises:
        DataError: As for `ChatText`, or no conversation has such a response.
    """
    import pyarrow as pa

    tokens = pa.list_(pa.int32())
    schema = pa.schema(
        [("input_ids", tokens), ("labels", tokens), ("length", pa.int32()), ("scored", pa.int32())]
    )
    for path in files:
        if format_of(path) == ".txt":
            raise DataError(f"cannot read {path} as conversations: it is text; remove data.chat")
    key = cache_key(
        *("chat", 2, files_fingerprint(files, "messages"), sequence_length),
        *(tokenizer_fingerprint(tokenizer), tokenizer.chat_template, tokenizer.special_tokens_map),
    )
    rows = cached_table(
        cache / f"chat-{key}.arrow",
        schema,
        lambda: _batches(files, tokenizer, sequence_length, schema),
        content="conversations",
    )
    if not len(rows):
        raise DataError(f"{name_files(files)} has no conversation; write one per line")
    lengths, scored = (rows.column(name) for name in ("length", "scored"))
    num_truncated, num_skipped = int((lengths > sequence_length).sum()), int((scored == 0).sum())
    if num_skipped == len(rows):
        raise DataError(
            f"no conversation in {name_files(files)} has a response with a weight within "
            f"{sequence_length} tokens; raise data.sequence_length"
        )
    if num_truncated or num_skipped:
        print_once(
            f"{num_truncated} of {len(rows)} conversations are truncated to data.sequence_length "
            f"{sequence_length}; {num_skipped} have nothing to learn within it and are skipped"
        )
    return rows.select(scored.nonzero()[0])


def _print_forms(files: Sequence[Path]) -> None:
    forms = {path: form_of(path) for path in files}
    for form in dict.fromkeys(forms.values()):
        if form is not None:
            name = name_files([path for path in files if forms[path] == form])
            print_once(f"{name} has conversations in the form {form.name}: {form.example}")


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase", conversation: Conversation, location: str
) -> Tokens:
    """Encode a conversation with the chat template, and label the assistant's messages.

    The text of a message is what the template appends, with the message, to what it wrote for all
    messages before and the generation prompt: what the model has to generate. The whole text is
    encoded at once, and a token of two texts is learned, as transformers does.

    Args:
        tokenizer: Has a chat template.
        conversation: From `read_conversations`.
        location: File and line of the conversation, for errors.

    Returns:
        The tokens up to the end of the assistant's last message.

    Raises:
        DataError: The template fails, or changes what it wrote before when a message is added, like
            templates that remove earlier reasoning.
    """
    text = ""
    learned: list[tuple[int, int]] = []
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, conversation, index, location, prompts=True)
        whole = _render(tokenizer, conversation, index + 1, location)
        if not prompt.startswith(text) or not whole.startswith(prompt):
            raise DataError(
                f"{location}: the chat template changes earlier text when it adds message "
                f"{index + 1}, so the text of that message is unknown; remove the conversation, "
                "or set a template that only appends"
            )
        if index not in conversation.not_learned:
            learned.append((len(prompt), len(whole)))
        text = whole
    return _label(tokenizer, text, learned)


def _label(
    tokenizer: "PreTrainedTokenizerBase", text: str, learned: Sequence[tuple[int, int]]
) -> Tokens:
    """Encode a text, and label the tokens that overlap with given ranges of its characters."""
    if not tokenizer.is_fast:
        raise DataError(
            f"data.chat needs to know the characters of each token, which the tokenizer "
            f"{tokenizer.name_or_path!r} does not tell; choose one with a tokenizer.json"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    labels = [IGNORED] * len(ids)
    for index, (start, end) in enumerate(encoded["offset_mapping"]):
        if any(start < last and end > first for first, last in learned):
            labels[index] = ids[index]
    return Tokens(ids, labels)


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Encode a user's message, followed by the generation prompt.

    Raises:
        DataError: The template fails.
    """
    conversation = Conversation([{"role": "user", "content": text}])
    prompt = _render(tokenizer, conversation, 1, "the prompt", prompts=True)
    return cast(list[int], tokenizer(prompt, add_special_tokens=False)["input_ids"])


def end_of_turn_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the token that ends a message of the assistant, or None if the template has none.

    Raises:
        DataError: As for `encode_chat`.
    """
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    special = special_token_ids(tokenizer)
    labels = encode_chat(tokenizer, Conversation(turns), "a greeting").labels
    return next((label for label in labels if label in special), None)


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    conversation: Conversation,
    count: int,
    location: str,
    *,
    prompts: bool = False,
) -> str:
    """Write the first messages of a conversation, and the generation prompt if `prompts`."""
    try:
        found = tokenizer.apply_chat_template(
            conversation.messages[:count],
            tools=conversation.tools,
            add_generation_prompt=prompts,
            tokenize=False,
        )
    except Exception as error:  # templates raise any type
        raise DataError(
            f"{location}: the chat template fails ({first_line(error)}); fix the conversation or "
            "the template"
        ) from error
    return cast(str, found)


class _TemplateCheck:
    """Refuses conversations of which the chat template leaves out a part, once for each kind."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._seen: set[str] = set()

    def check(self, conversation: Conversation, location: str) -> None:
        """Write each kind of part that was not seen yet, as it is and changed.

        Raises:
            DataError: The text is the same.
        """
        messages = conversation.messages
        if conversation.tools:
            self._compare("tools", conversation, conversation._replace(tools=None), location)
        for index, message in enumerate(messages):
            whole = conversation._replace(messages=messages[: index + 1])
            for name in _WRITTEN_KEYS:
                if not message.get(name):
                    continue
                kind = f"{name} of a message of the role {message['role']}"
                if name == "content" and "tool_calls" in message:
                    kind += " with tool_calls"
                value = [] if name == "tool_calls" else f"{message[name]} and more"
                changed = [*messages[:index], {**message, name: value}]
                self._compare(kind, whole, whole._replace(messages=changed), location)

    def _compare(
        self, kind: str, conversation: Conversation, other: Conversation, location: str
    ) -> None:
        if kind in self._seen:
            return
        self._seen.add(kind)
        text = _render(self._tokenizer, conversation, len(conversation.messages), location)
        try:
            differs = text != _render(self._tokenizer, other, len(other.messages), location)
        except DataError:  # it reads the part, and refuses what it was changed to
            differs = True
        if not differs:
            raise DataError(
                f"{location}: the chat template leaves out the {kind}; remove it from the "
                "conversations, or set a template that writes it"
            )


def _batches(
    files: Sequence[Path],
    tokenizer: "PreTrainedTokenizerBase",
    sequence_length: int,
    schema: "pa.Schema",
) -> Iterator[tuple["pa.RecordBatch", int]]:
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    template = _TemplateCheck(tokenizer)
    ignored: set[str] = set()
    for path in files:
        for location, found in read_conversations(path):
            if isinstance(found, Tokens):
                ids, labels = _check_ids(tokenizer, found, location)
            else:
                ignored |= found.ignored
                template.check(found, location)
                ids, labels = encode_chat(tokenizer, found, location)
            labels = labels[:sequence_length]
            scored = sum(label != IGNORED for label in labels[1:])
            row = {"input_ids": ids[:sequence_length], "labels": labels, "length": len(ids)}
            rows.append({**row, "scored": scored})
            if len(rows) == _CONVERSATIONS_PER_BATCH:
                yield pa.RecordBatch.from_pylist(rows, schema=schema), len(rows)
                rows = []
    if ignored:
        print_once(f"{name_files(files)} has keys that are not used: {', '.join(sorted(ignored))}")
    yield pa.RecordBatch.from_pylist(rows, schema=schema), len(rows)


def _check_ids(tokenizer: "PreTrainedTokenizerBase", tokens: Tokens, location: str) -> Tokens:
    for token in (min(tokens.ids, default=0), max(tokens.ids, default=0)):
        if not 0 <= token < len(tokenizer):
            raise DataError(
                f"{location} has the token id {token}, but the tokenizer "
                f"{tokenizer.name_or_path!r} has 0 to {len(tokenizer) - 1}; set data.tokenizer to "
                "the one that made them"
            )
    return tokens

"""Conversations from .jsonl files as rows whose loss covers only the assistant's messages."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from foam_lightning.data.cache import cache_key, cached_table
from foam_lightning.data.files import files_fingerprint
from foam_lightning.data.loader import EpochSampler
from foam_lightning.data.notices import print_once
from foam_lightning.data.packing import IGNORED, evenly_spaced, rows_in_whole_batches
from foam_lightning.data.records import format_of, list_files, read_records
from foam_lightning.data.sources import VALIDATION_FRACTION
from foam_lightning.data.tokenizer import special_token_ids, tokenizer_fingerprint
from foam_lightning.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from foam_lightning.data.table import Table

ROLES = ("system", "user", "assistant")
"""Roles of a conversation; for those of matrices see `model.roles`."""
PLAIN_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}{% for message in messages %}"
    "### {{ message['role'] | capitalize }}\n{{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Assistant\n{% endif %}"
)
"""Chat template for tokenizers without one: "### User", the message on the next line, an empty
line, "### Assistant", and on the next line the answer, which ends with the end-of-text token. It
is exported with the tokenizer."""
_CONVERSATIONS_PER_BATCH = 256

Messages = list[dict[str, str]]


class Encoded(NamedTuple):
    """An encoded conversation.

    Attributes:
        ids: Tokens up to the end of the assistant's last message.
        labels: The same tokens in the assistant's messages, end-of-turn token included; -100
            elsewhere.
    """

    ids: list[int]
    labels: list[int]


class ChatText:
    """Rows of one conversation each, in memory-mapped files.

    Args:
        files: Conversations as .jsonl, one per line: {"messages": [{"role": "user", "content":
            TEXT}, ...]}, with the roles system, user and assistant, or {"prompt": TEXT,
            "response": TEXT}.
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
        DataError: A line is not a conversation, the template does not separate responses, or there
            are too few conversations.
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
        train = chat_dataset(list_files(files), tokenizer, sequence_length, cache)
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
            validation = chat_dataset(
                list_files(validation_files), tokenizer, sequence_length, cache
            )
        self.train = train.select(
            range(rows_in_whole_batches(len(train), batch_size, sequence_length))
        )
        count = min(validation_sequences, len(validation))
        self.validation = validation.select(evenly_spaced(count, len(validation)))

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
        *("chat", 1, files_fingerprint(files, "messages"), sequence_length),
        *(tokenizer_fingerprint(tokenizer), tokenizer.chat_template, tokenizer.special_tokens_map),
    )
    rows = cached_table(
        cache / f"chat-{key}.arrow",
        schema,
        lambda: _batches(files, tokenizer, sequence_length, schema),
        content="conversations",
    )
    if not len(rows):
        raise DataError(f"{files[0]} has no conversation, only whitespace; write one per line")
    lengths, scored = (rows.column(name) for name in ("length", "scored"))
    num_truncated, num_skipped = int((lengths > sequence_length).sum()), int((scored == 0).sum())
    if num_skipped == len(rows):
        raise DataError(
            f"no conversation in {files[0]} has a response within {sequence_length} tokens; raise "
            "data.sequence_length"
        )
    if num_truncated:
        print_once(
            f"{num_truncated} of {len(rows)} conversations are truncated to data.sequence_length "
            f"{sequence_length}; {num_skipped} have no response within it and are skipped"
        )
    return rows.select(scored.nonzero()[0])


def read_conversations(path: Path) -> Iterator[tuple[str, Messages]]:
    """Read the conversations of a file, each with its file and line for errors.

    Raises:
        DataError: The file is unreadable, or a line is not a conversation.
    """
    for record in read_records(path):
        yield record.location, _parse_conversation(record.values, record.location)


def encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: Messages, location: str) -> Encoded:
    """Encode a conversation with the chat template, and label the assistant's messages.

    The tokens of a message are those that the template appends, with the message, to what it wrote
    for all messages before and the generation prompt: the tokens that the model has to generate.

    Args:
        tokenizer: Has a chat template.
        messages: From `read_conversations`.
        location: File and line of the conversation, for errors.

    Raises:
        DataError: The template fails, or changes what it wrote before when a message is added, like
            templates that remove earlier reasoning.
    """
    ids: list[int] = []
    labels: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:index], location, prompts=True)
        whole = _render(tokenizer, messages[: index + 1], location, prompts=False)
        if prompt[: len(ids)] != ids or whole[: len(prompt)] != prompt:
            raise DataError(
                f"{location}: the chat template changes earlier text when it adds message "
                f"{index + 1}, so the tokens of that message are unknown; remove the conversation, "
                "or set a template that only appends"
            )
        labels += [IGNORED] * (len(prompt) - len(ids)) + whole[len(prompt) :]
        ids = whole
    return Encoded(ids, labels)


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Encode a user's message, followed by the generation prompt.

    Raises:
        DataError: The template fails.
    """
    messages = [{"role": "user", "content": text}]
    return _render(tokenizer, messages, "the prompt", prompts=True)


def end_of_turn_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the token that ends a message of the assistant, or None if the template has none.

    Raises:
        DataError: As for `encode_chat`.
    """
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    special = special_token_ids(tokenizer)
    labels = encode_chat(tokenizer, turns, "a greeting").labels
    return next((label for label in labels if label in special), None)


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, location: str, *, prompts: bool
) -> list[int]:
    try:
        found = tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompts, return_dict=False
        )
    except Exception as error:  # templates raise any type
        raise DataError(
            f"{location}: the chat template fails ({first_line(error)}); fix the conversation or "
            "the template"
        ) from error
    return cast(list[int], found)


def _parse_conversation(record: dict[str, Any], location: str) -> Messages:
    messages = _list_messages(record)
    if messages is None:
        raise DataError(
            f'{location} is not a conversation; write {{"messages": [{{"role": ..., "content": '
            'TEXT}, ...]}, or {"prompt": TEXT, "response": TEXT}'
        )
    roles = [message.get("role") for message in messages]
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise DataError(f"{location} has the role {unknown[0]!r}; use {', '.join(ROLES)}")
    if "assistant" not in roles or roles[0] == "assistant":
        raise DataError(
            f"{location} needs a message of the assistant after another message; its roles are "
            f"{', '.join(map(str, roles))}"
        )
    return messages


def _list_messages(record: dict[str, Any]) -> Messages | None:
    """List the messages of a line; None if it has none, or one without text."""
    messages = record.get("messages")
    if messages is None:
        pairs = (("user", record.get("prompt")), ("assistant", record.get("response")))
        messages = [{"role": role, "content": text} for role, text in pairs]
    if not isinstance(messages, list) or not messages:
        return None
    are_texts = all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages)
    return messages if are_texts else None


def _batches(
    files: Sequence[Path],
    tokenizer: "PreTrainedTokenizerBase",
    sequence_length: int,
    schema: "pa.Schema",
) -> Iterator[tuple["pa.RecordBatch", int]]:
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    for path in files:
        for location, messages in read_conversations(path):
            ids, labels = encode_chat(tokenizer, messages, location)
            labels = labels[:sequence_length]
            scored = sum(label != IGNORED for label in labels[1:])
            row = {"input_ids": ids[:sequence_length], "labels": labels, "length": len(ids)}
            rows.append({**row, "scored": scored})
            if len(rows) == _CONVERSATIONS_PER_BATCH:
                yield pa.RecordBatch.from_pylist(rows, schema=schema), len(rows)
                rows = []
    yield pa.RecordBatch.from_pylist(rows, schema=schema), len(rows)

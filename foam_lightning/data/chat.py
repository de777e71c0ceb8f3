"""Conversations: jsonl to rows in which the loss sees what the assistant says, and nothing else."""

import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from foam_lightning.data.cache import cache_key, cached_dataset
from foam_lightning.data.files import files_fingerprint, parse_line
from foam_lightning.data.loader import EpochSampler
from foam_lightning.data.packing import IGNORED, even_subset, num_in_whole_batches
from foam_lightning.data.sources import VALIDATION_FRACTION
from foam_lightning.data.tokenizer import fingerprint_of, special_ids
from foam_lightning.distributed.topology import is_first_process
from foam_lightning.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
PLAIN_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}{% for message in messages %}"
    "### {{ message['role'] | capitalize }}\n{{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Assistant\n{% endif %}"
)
"""The template of a tokenizer that has none. It is exported with it, so whoever loads the model
writes prompts as it was trained: "### User", the message below it, an empty line, "### Assistant",
and below it the answer, which ends with the end-of-text token."""
_CONVERSATIONS_AT_ONCE = 256

Messages = list[dict[str, str]]


class Encoded(NamedTuple):
    """A conversation as tokens.

    Attributes:
        ids: All of them, up to the end of the last thing that the assistant says.
        labels: The same tokens where the assistant speaks, the mark that ends it included; -100
            elsewhere.
    """

    ids: list[int]
    labels: list[int]


class ChatText:
    """Rows of one conversation each, in memory-mapped files, shorter ones to be padded.

    Args:
        files: Conversations as .jsonl, one in a line: {"messages": [{"role": "user", "content":
            TEXT}, ...]}, with the roles system, user and assistant, or {"prompt": TEXT,
            "response": TEXT}.
        validation_files: Conversations to evaluate on; None holds out 5 percent of `files`.
        tokenizer: Its chat template writes them; without one it gets `PLAIN_TEMPLATE`.
        sequence_length: Tokens after which a conversation is cut off.
        batch_size: Rows in an optimizer step; an epoch is whole steps.
        validation_sequences: Rows to validate on, if there are as many.
        cache: Where the rows are kept, so that the next time is quick.

    Attributes:
        train: Rows with "input_ids" and "labels".
        validation: The same, held out.

    Raises:
        DataError: A line is no conversation, the template does not write it so that responses can
            be told from the rest, or there is not enough.
    """

    def __init__(
        self,
        files: list[str],
        validation_files: list[str] | None,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        sequence_length: int,
        batch_size: int,
        validation_sequences: int,
        cache: Path,
    ) -> None:
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN_TEMPLATE
        train = chat_dataset(files, tokenizer, sequence_length, cache)
        if validation_files is None:
            count = int(len(train) * VALIDATION_FRACTION)
            if count == 0:
                raise DataError(
                    f"{len(train)} conversations are too few to hold out "
                    f"{VALIDATION_FRACTION:.0%} of them; give data.validation_files, or more"
                )
            held_out = even_subset(count, len(train))
            validation = train.select(held_out)
            train = train.select(sorted(set(range(len(train))) - set(held_out)))
        else:
            validation = chat_dataset(validation_files, tokenizer, sequence_length, cache)
        self.train: Dataset = train.select(
            range(num_in_whole_batches(len(train), batch_size, sequence_length))
        )
        count = min(validation_sequences, len(validation))
        self.validation: Dataset = validation.select(even_subset(count, len(validation)))

    def sampler(self, *, seed: int, world: int, rank: int) -> EpochSampler:
        """Decide the order of the training rows.

        Args:
            seed: What it follows from, together with the epoch.
            world: Ranks.
            rank: Whose rows these are.
        """
        return EpochSampler(self.train, world, rank, seed=seed, drop_last=True)


def chat_dataset(
    files: list[str], tokenizer: "PreTrainedTokenizerBase", sequence_length: int, cache: Path
) -> "Dataset":
    """Make a row of every conversation that has a response within the length; tell of the others.

    Raises:
        DataError: As for `ChatText`, or no conversation has one.
    """
    import pyarrow as pa

    tokens = pa.list_(pa.int32())
    schema = pa.schema(
        [("input_ids", tokens), ("labels", tokens), ("length", pa.int32()), ("scored", pa.int32())]
    )
    for path in files:
        if Path(path).suffix != ".jsonl":
            raise DataError(f"cannot read {path} as conversations: data.chat needs .jsonl files")
    key = cache_key(
        *("chat", 1, files_fingerprint(files, "messages"), sequence_length),
        *(fingerprint_of(tokenizer), tokenizer.chat_template, tokenizer.special_tokens_map),
    )
    rows = cached_dataset(
        cache / f"chat-{key}.arrow",
        schema,
        lambda: _batches(files, tokenizer, sequence_length, schema),
        content="conversations",
    )
    if not len(rows):
        raise DataError(f"{files[0]} holds no conversation, only blanks; give one a line")
    lengths, scored = (rows.data.column(name).to_numpy() for name in ("length", "scored"))
    num_cut, num_out = int((lengths > sequence_length).sum()), int((scored == 0).sum())
    if num_out == len(rows):
        raise DataError(
            f"no conversation in {files[0]} has a response within {sequence_length} tokens; raise "
            "data.sequence_length"
        )
    if num_cut:
        _tell(
            f"{num_cut} of {len(rows)} conversations are longer than data.sequence_length "
            f"{sequence_length} and cut off; {num_out} have no response within it and are left out"
        )
    kept = rows.select(scored.nonzero()[0]).select_columns(["input_ids", "labels"])
    return kept.with_format("numpy")


def conversations(path: Path) -> Iterator[tuple[str, Messages]]:
    """Read the conversations of a file, each with its place for errors.

    Raises:
        DataError: The file cannot be read, or a line is no conversation; it is named.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"{path} line {number}"
                    yield place, _messages(line, place)
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror or error})") from error


def encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: Messages, place: str) -> Encoded:
    """Turn a conversation into tokens by the template, and find what the assistant says in them.

    What it says is what the template adds to all that comes before, with the prompt to answer, when
    the answer is there: the tokens that it would have to write.

    Args:
        tokenizer: Has a chat template.
        messages: From `conversations`.
        place: What to call the conversation in an error.

    Raises:
        DataError: The template refuses the conversation, or writes its beginning otherwise once
            more follows, as one that removes earlier reasoning does.
    """
    ids: list[int] = []
    labels: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _written(tokenizer, messages[:index], place, prompts=True)
        whole = _written(tokenizer, messages[: index + 1], place, prompts=False)
        if prompt[: len(ids)] != ids or whole[: len(prompt)] != prompt:
            raise DataError(
                f"{place}: the chat template changes what it wrote before when message {index + 1} "
                "follows, so the tokens of that cannot be told from the rest; leave the "
                "conversation out, or set a template that only appends"
            )
        labels += [IGNORED] * (len(prompt) - len(ids)) + whole[len(prompt) :]
        ids = whole
    return Encoded(ids, labels)


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Turn what a user says into the tokens that an answer follows.

    Raises:
        DataError: The template refuses it.
    """
    messages = [{"role": "user", "content": text}]
    return _written(tokenizer, messages, "the prompt", prompts=True)


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Find the token that ends what the assistant says; None where the template has no such mark.

    Raises:
        DataError: As for `encode_chat`.
    """
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    special = special_ids(tokenizer)
    labels = encode_chat(tokenizer, turns, "a greeting").labels
    return next((label for label in labels if label in special), None)


def _written(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, place: str, *, prompts: bool
) -> list[int]:
    try:
        found = tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompts, return_dict=False
        )
    except Exception as error:  # a template raises what it likes
        raise DataError(
            f"{place}: the chat template refuses it ({first_line(error)}); mend it"
        ) from error
    return cast(list[int], found)


def _messages(line: bytes, place: str) -> Messages:
    record = parse_line(line, place)
    messages = _listed(record) if isinstance(record, dict) else None
    if messages is None:
        raise DataError(
            f'{place} is no conversation; write {{"messages": [{{"role": ..., "content": TEXT}}, '
            '...]}, or {"prompt": TEXT, "response": TEXT}'
        )
    roles = [message.get("role") for message in messages]
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise DataError(f"{place} has the role {unknown[0]!r}; there are {', '.join(ROLES)}")
    if "assistant" not in roles or roles[0] == "assistant":
        raise DataError(
            f"{place} needs a message of the assistant, and another one before it; its roles are "
            f"{', '.join(map(str, roles))}"
        )
    return messages


def _listed(record: dict[str, Any]) -> Messages | None:
    """List the messages of a line; None if it has none, or they are no texts."""
    messages = record.get("messages")
    if messages is None:
        pairs = (("user", record.get("prompt")), ("assistant", record.get("response")))
        messages = [{"role": role, "content": text} for role, text in pairs]
    if not isinstance(messages, list) or not messages:
        return None
    are_texts = all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages)
    return messages if are_texts else None


def _batches(
    files: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    sequence_length: int,
    schema: "pa.Schema",
) -> Iterator[tuple["pa.RecordBatch", int]]:
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    for path in map(Path, files):
        for place, messages in conversations(path):
            ids, labels = encode_chat(tokenizer, messages, place)
            kept = labels[:sequence_length]
            scored = sum(label != IGNORED for label in kept[1:])
            row = {"input_ids": ids[:sequence_length], "labels": kept, "length": len(ids)}
            rows.append({**row, "scored": scored})
            if len(rows) == _CONVERSATIONS_AT_ONCE:
                yield pa.RecordBatch.from_pylist(rows, schema=schema), len(rows)
                rows = []
    yield pa.RecordBatch.from_pylist(rows, schema=schema), len(rows)


@cache  # every short run of a search makes its data anew
def _tell(message: str) -> None:
    if is_first_process():
        sys.stderr.write(f"{message}\n")

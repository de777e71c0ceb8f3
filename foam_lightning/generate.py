"""Generate text from a checkpoint, streamed to the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foam_lightning.checkpoint.load import load_module, load_tokenizer
from foam_lightning.data.chat import encode_prompt, end_of_turn_id
from foam_lightning.errors import ConfigError
from foam_lightning.model.llama import stop_token_ids
from foam_lightning.validation import WRITING, check_ranges

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate_text(
    path: Path, prompt: str, *, is_chat: bool, max_new_tokens: int, temperature: float, seed: int
) -> None:
    """Print the text that the model of a checkpoint generates from a prompt.

    Args:
        path: The checkpoint, in its run folder.
        prompt: The beginning of the text, or the user's message in a chat.
        is_chat: Apply the chat template of the tokenizer, stop at the end of the turn, and print
            the answer without the prompt.
        max_new_tokens: The most tokens to generate.
        temperature: Of the softmax; 0 always takes the most likely token.
        seed: Seeds sampling.

    Raises:
        CheckpointError: The checkpoint or its tokenizer cannot be read.
        ConfigError: A number is out of range; or in a chat the tokenizer has no chat template, or
            the prompt is empty.
        DataError: The chat template fails on a conversation of one message.
    """
    from transformers import TextStreamer

    check_ranges("--", {"max_new_tokens": max_new_tokens, "temperature": temperature}, WRITING)
    module = load_module(path).eval()
    tokenizer = load_tokenizer(path)
    inputs = _encode_chat(tokenizer, prompt) if is_chat else _encode(tokenizer, prompt)
    model: Any = module.model
    model.set_attn_implementation("sdpa")  # with masks: a prompt may be longer than a window
    turn = end_of_turn_id(tokenizer) if is_chat else None
    torch.manual_seed(seed)
    model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        use_cache=True,
        eos_token_id=stop_token_ids(model, tokenizer.eos_token_id, turn),
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=is_chat, skip_special_tokens=True),
    )


def _encode(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> dict[str, Any]:
    # An empty prompt starts a document: in training one follows each end-of-sequence token.
    text = prompt or tokenizer.eos_token
    return dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False))


def _encode_chat(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> dict[str, Any]:
    if tokenizer.chat_template is None:
        raise ConfigError(
            "the tokenizer of the checkpoint has no chat template; set --data.chat false to "
            "continue the prompt as plain text"
        )
    if not prompt.strip():
        raise ConfigError("a chat needs --prompt TEXT, the message of the user")
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

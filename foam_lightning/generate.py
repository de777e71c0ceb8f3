"""Text from a checkpoint, to the terminal while it is written."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foam_lightning.checkpoint.load import load_module, load_tokenizer
from foam_lightning.data.chat import encode_prompt, end_of_turn
from foam_lightning.errors import ConfigError
from foam_lightning.model.llama import ends
from foam_lightning.validation import WRITING, check_ranges

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write(
    path: Path, prompt: str, *, is_chat: bool, max_new_tokens: int, temperature: float, seed: int
) -> None:
    """Write what the model of a checkpoint makes of a prompt.

    Args:
        path: The checkpoint, in its run folder.
        prompt: What the text begins with, or in a conversation what the user says.
        is_chat: Answer as in a conversation, by the chat template of the tokenizer, up to the end
            of the turn, and print the answer alone.
        max_new_tokens: Where to stop at the latest.
        temperature: 0 always takes the likeliest token.
        seed: Of what is drawn.

    Raises:
        CheckpointError: The checkpoint or its tokenizer cannot be read.
        ConfigError: A number is out of range; or it is to be a conversation, and the tokenizer has
            no chat template, or the user says nothing.
        DataError: The chat template refuses a conversation of one message.
    """
    from transformers import TextStreamer

    asked = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    check_ranges("--", asked, WRITING)
    module = load_module(path).eval()
    tokenizer = load_tokenizer(path)
    inputs = _of_user(tokenizer, prompt) if is_chat else _beginning(tokenizer, prompt)
    writer: Any = module.model
    turn = end_of_turn(tokenizer) if is_chat else None
    torch.manual_seed(seed)
    writer.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        use_cache=True,
        eos_token_id=ends(writer, tokenizer.eos_token_id, turn),
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=is_chat, skip_special_tokens=True),
    )


def _beginning(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> dict[str, Any]:
    # An empty prompt starts a document, which is where one ended in training.
    text = prompt or tokenizer.eos_token
    return dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False))


def _of_user(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> dict[str, Any]:
    if tokenizer.chat_template is None:
        raise ConfigError(
            "the tokenizer of the checkpoint has no chat template; set --data.chat false to go on "
            "with the prompt as plain text"
        )
    if not prompt.strip():
        raise ConfigError("a conversation needs --prompt TEXT, what the user says")
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

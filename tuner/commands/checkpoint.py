"""The commands on one checkpoint: validate, generate, export."""

import sys
from pathlib import Path

from foam_lightning.checkpoint.load import load_module, load_tokenizer
from foam_lightning.data.chat import end_of_turn_id
from foam_lightning.data.records import name_files
from foam_lightning.data.saved import name_text, settings_to_save
from foam_lightning.errors import CheckpointError, ConfigError
from foam_lightning.evaluate import format_perplexity, validate
from foam_lightning.generate import generate_text
from foam_lightning.model.gguf import GgufDtype, save_gguf
from foam_lightning.model.llama import save_model
from foam_lightning.resume import use_checkpoint_model, use_checkpoint_tokenizer
from foam_lightning.storage.paths import exists
from tuner.config.parser import Settings


def run_validate(settings: Settings) -> None:
    """Print the unbiased perplexity of a checkpoint."""
    path = Path(settings.ckpt_path)
    module = load_module(path)
    job = use_checkpoint_model(settings.job().with_one_device(), module)
    job = use_checkpoint_tokenizer(job, [path])
    plan = module.plan
    assert plan is not None
    data = job.new_data(plan.memory_options)
    trainer = job.new_trainer(
        plan.memory_options,
        [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stdout.isatty(),
    )
    loss, num_tokens = validate(trainer, module, data)
    text = settings_to_save(job.data)
    held_out = text["validation_files"]
    name = name_files(held_out) if held_out else name_text(text)
    print(f"validation text: that of {name}", file=sys.stderr)
    num_batches = len(data.val_dataloader()) if settings.biased else None
    print(format_perplexity(loss, num_tokens, num_batches=num_batches))


def run_generate(settings: Settings) -> None:
    """Print text that a checkpoint generates."""
    generate_text(
        Path(settings.ckpt_path),
        settings.prompt,
        is_chat=settings.data.chat,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed_everything,
    )


def run_export(settings: Settings) -> None:
    """Write a checkpoint as a Hugging Face folder or a GGUF file."""
    path, output = Path(settings.ckpt_path), Path(settings.output)
    is_file = settings.format == "gguf"
    dtype: GgufDtype = settings.dtype or "bfloat16"
    if settings.dtype is not None and not is_file:
        raise ConfigError(f"--dtype {dtype} is for --format gguf; add it, or remove --dtype")
    if exists(output) and (is_file or not output.is_dir() or any(output.iterdir())):
        free = "" if is_file else " and is not an empty folder"
        raise CheckpointError(f"--output {output} exists{free}; name another")
    module = load_module(path)
    assert module.model is not None
    tokenizer = load_tokenizer(path)
    turn = end_of_turn_id(tokenizer) if settings.data.chat else None
    if is_file:
        save_gguf(module.model, tokenizer, output, dtype, end_of_turn=turn)
        print(f"wrote {output}, {dtype}; run it with llama-cli -m {output}")
        return
    save_model(module.model, tokenizer, output, end_of_turn=turn)
    print(f"wrote {output}; load it with AutoModelForCausalLM.from_pretrained({str(output)!r})")

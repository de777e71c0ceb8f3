"""Every kind of bad input ends in one line, with the documented exit code, and leaves nothing."""

import hashlib
from pathlib import Path

import torch

from tests import bad_input
from tests.pretrained import save_pretrained, save_tokenizer
from tests.tiny import write_settings
from tuner.settings import parse

CASES = [*bad_input.USAGE, *bad_input.BUDGETS, *bad_input.INFEASIBLE, *bad_input.NUMBERS, *bad_input.YAML, *bad_input.HOSTILE, *bad_input.DATA, *bad_input.PLANS, *bad_input.CHECKPOINTS, *bad_input.FOLDERS, *bad_input.PLACES, *bad_input.REST]


def tree(folder: Path) -> dict[str, str]:
    """Name everything in a folder with a digest of its content, caches left out."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        )
        for path in sorted(folder.rglob("*"))
        if "cache" not in path.relative_to(folder).parts
    }


def make_good(folder: Path) -> None:
    settings = write_settings(folder)
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace(f"runs: {folder}/runs", "runs: runs"), encoding="utf-8")
    job = parse("fit", ["--config", str(settings)], default=None).job()
    plan = job.plan_at(1)
    plan.save(folder / "plan.json")
    module = job.new_module()
    module.follow(plan)
    module.configure_model()
    checkpoint = folder / "run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    content = {
        "fold_plan": plan.to_json(),
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
    }
    torch.save(content, checkpoint)
    save_pretrained(folder / "pretrained", "llama-2")
    save_tokenizer(folder / "run" / "tokenizer", template=None)
    (folder / "run" / "config.yaml").write_text(settings.read_text(encoding="utf-8"))

"""Which settings identify a run: those that change its result."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from foam_lightning.data.own import source_file
from foam_lightning.settings import full_precision_name
from foam_lightning.storage.run_identity import RunIdentity, named_files
from foam_lightning.units import ByteSize
from tuner.config.parser import Settings, make_parser
from tuner.config.safe_yaml import load_yaml

# The end of a run: a finished one is extended where nothing else differs.
ENDS = ("trainer.max_steps", "trainer.max_epochs")
# Where a run is kept, what it shows and measures, when it stops to be continued, and limits that a
# run which has stopped at them may need higher. None of them changes what a step does.
FREE = {
    *(
        "name",
        "runs",
        "debug",
        "trainer.enable_autolog_hparams",
        "data.cache_dir",
        "trainer.logger",
    ),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.log_every_n_steps"),
    *("trainer.enable_checkpointing", "trainer.num_sanity_val_steps", "trainer.profiler"),
    *("trainer.val_check_interval", "trainer.check_val_every_n_epoch"),
    *("trainer.limit_val_batches", "trainer.detect_anomaly", "trainer.max_time"),
    *("model.max_skipped_steps", "model.max_rollbacks", "model.spike_nats"),
}
_FILES = {"data.files", "data.validation_files", "data.tokenizer", "data.dataset"}
_FILES |= {"model.pretrained", "fold_plan", "ckpt_path"}
_FILES_OF_SOURCE = ("files", "validation_files", "dataset")


def run_identity(settings: Settings) -> RunIdentity:
    """Return what identifies the run of a command.

    Args:
        settings: Of the command.
    """
    checkpoint = settings.values.get("ckpt_path")
    # As runs of older versions are identified.
    text = settings.text if checkpoint is None else f"{settings.text}ckpt_path: {checkpoint}\n"
    values = {**yaml.safe_load(settings.text), "ckpt_path": checkpoint}
    return RunIdentity(_identifying(values), _defaults, text, _read_config)


@cache
def _defaults() -> dict[str, Any]:
    parser = make_parser("fit")
    return _identifying(yaml.safe_load(parser.dump(parser.get_defaults(), skip_validation=True)))


def _read_config(path: Path) -> dict[str, Any] | None:
    """Read the config.yaml of a run of an older version; None if it cannot be read."""
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(values, dict):
        return None
    if values.get("fold_plan") == str(path.parent / "fold_plan.json"):
        del values["fold_plan"]  # which is the run's own
    return _identifying(values)


def _identifying(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that count, by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("model", "data", "trainer", "tune") and isinstance(value, Mapping):
            flat |= {f"{name}.{key}": one for key, one in value.items()}
        else:
            flat[name] = value
    if not flat.get("data.streaming"):  # where the workers decide the order of the rows
        flat.pop("data.num_workers", None)
    return {name: _canonical(name, value) for name, value in flat.items() if name not in FREE}


def _canonical(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name == "memory_budget":
        return int(ByteSize(str(value)))
    if name == "trainer.precision":
        return full_precision_name(value)
    if name == "data.sources":
        return [
            {k: _with_contents(v) if k in _FILES_OF_SOURCE else v for k, v in source.items()}
            for source in value
        ]
    if name == "data.class_path":
        return [value, named_files(source_file(value) or value)]
    if name == "data.init_args":
        return {key: _with_contents(one) for key, one in value.items()}
    return _with_contents(value) if name in _FILES else value


def _with_contents(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    return [named_files(str(one)) for one in names] if isinstance(names, list) else value

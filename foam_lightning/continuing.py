"""A job that goes on from a checkpoint, and needs no folder that it once began from."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from foam_lightning.checkpoint import folder_of, newest_whole
from foam_lightning.job import Job
from foam_lightning.places import is_folder


def on_checkpoint(job: Job, path: Path, architecture: Mapping[str, Any] | None) -> Job:
    """Take the model and the tokenizer that were kept, whatever the settings name.

    Args:
        job: What to do with the checkpoint.
        path: The checkpoint; a tokenizer lies beside it while it is in its run folder.
        architecture: Of the model in it, where that began in a pretrained folder.
    """
    tokenizer = folder_of(path).tokenizer
    data = {**job.data, "tokenizer": str(tokenizer)} if tokenizer.is_dir() else job.data
    return replace(job, architecture=architecture, data=data)


def without_folder(job: Job, checkpoints: Iterable[Path]) -> Job:
    """Let a checkpoint stand for the pretrained folder where that is gone.

    Args:
        job: What to go on with; returned as it is where its folder is there or it has none.
        checkpoints: Where it may go on from; the first that exists counts.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
    pretrained = job.model["pretrained"]
    if pretrained is None or is_folder(Path(pretrained)):
        return job
    for path in checkpoints:
        if (found := newest_whole(path)) is not None:
            return on_checkpoint(
                job, found.path, found.content["hyper_parameters"].get("architecture")
            )
    return job

"""Short runs that searches of the same job have done before, so that another budget finds them."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import OptunaError
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from foam_lightning.training import versions
from tuner.objective import ShortRun
from tuner.study import Params, run_of

# Settings of the trainer that no short run depends on: it has its own, or its own place.
_ELSEWHERE = {
    *("max_steps", "max_epochs", "max_time", "min_steps", "min_epochs", "callbacks"),
    *("val_check_interval", "check_val_every_n_epoch", "log_every_n_steps", "limit_val_batches"),
    *("devices", "num_nodes", "strategy", "enable_progress_bar", "enable_model_summary"),
    *("enable_checkpointing", "num_sanity_val_steps"),
}


@dataclass(frozen=True)
class Known:
    """What is known before a search begins.

    Attributes:
        runs: Short runs by their key.
        params: Parameters of finished trials by the name of their study, oldest first.
    """

    runs: Mapping[str, ShortRun] = field(default_factory=dict)
    params: Mapping[str, Sequence[Params]] = field(default_factory=dict)


def job_key(job: Job) -> str:
    """Name everything about a job, besides the plan, that its short runs depend on."""
    trainer = {key: value for key, value in job.trainer.items() if key not in _ELSEWHERE}
    data = {key: value for key, value in job.data.items() if key != "micro_batch_size"}
    sources = [data, *(data.get("sources") or ())]
    kinds = ("files", "validation_files")
    paths = [path for source in sources for kind in kinds for path in source.get(kind) or ()]
    stamps = [_stamp(Path(path)) for path in paths]
    return _digest([dict(job.model), data, stamps, trainer, job.seed, versions()])


def run_key(job_name: str, plan: FoldPlan, *, num_steps: int, seed: int) -> str:
    """Name a short run.

    Args:
        job_name: From `job_key`.
        plan: What it trains by. Of the levers the dtype of the state alone counts: the others
            change the loss by rounding.
        num_steps: Optimizer steps.
        seed: Of weights and data.
    """
    levels, scales = dict(plan.levels), dict(plan.scales)
    return _digest([job_name, levels, scales, plan.lr, plan.levers.state_dtype, num_steps, seed])


def known_of(databases: Iterable[Path], job_name: str) -> Known:
    """Collect what earlier searches of a job left.

    Args:
        databases: The sqlite files of their studies; one that cannot be read is passed over.
        job_name: From `job_key`.
    """
    runs: dict[str, ShortRun] = {}
    params: dict[str, list[Params]] = {}
    for database in databases:
        for study, trial in _trials(database):
            runs[trial.user_attrs["run"]] = run_of(trial)
            if trial.user_attrs.get("job") == job_name:
                params.setdefault(study, []).append(trial.params)
    return Known(runs, params)


def _trials(database: Path) -> list[tuple[str, FrozenTrial]]:
    try:
        url = f"sqlite:///{database}"
        names = optuna.get_all_study_names(url)
        studies = [optuna.load_study(study_name=name, storage=url) for name in names]
        return [
            (study.study_name, trial)
            for study in studies
            for trial in study.get_trials(deepcopy=False)
            if trial.state.is_finished() and {"nats", "run"} <= trial.user_attrs.keys()
        ]
    except (
        SQLAlchemyError,
        OptunaError,
        RuntimeError,
        KeyError,
    ):  # of another version, or no study
        return []


def _stamp(path: Path) -> Any:
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]

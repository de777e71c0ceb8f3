"""What a folder keeps of runs, so that the same command goes on from them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import OptunaError
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.atomic import write_json
from foam_lightning.training import versions
from tuner.trials.runner import TrialResult
from tuner.trials.study import Params, trial_result

# Settings of the trainer that no short run depends on: it has its own, or its own place.
_ELSEWHERE = {
    *("max_steps", "max_epochs", "max_time", "min_steps", "min_epochs", "callbacks"),
    *("val_check_interval", "check_val_every_n_epoch", "log_every_n_steps", "limit_val_batches"),
    *("devices", "num_nodes", "strategy", "enable_progress_bar", "enable_model_summary"),
    *("enable_checkpointing", "num_sanity_val_steps"),
}


@dataclass(frozen=True)
class EarlierTrials:
    """What is known before a search begins.

    Attributes:
        runs: Short runs by their key.
        params: Parameters of finished trials by the name of their study, oldest first.
    """

    runs: Mapping[str, TrialResult] = field(default_factory=dict)
    params: Mapping[str, Sequence[Params]] = field(default_factory=dict)


def job_key(job: Job) -> str:
    """Name everything about a job, besides the plan, that its short runs depend on."""
    trainer = {key: value for key, value in job.trainer.arguments.items() if key not in _ELSEWHERE}
    data = {key: value for key, value in asdict(job.data).items() if key != "micro_batch_size"}
    sources = [data, *(data.get("sources") or ())]
    kinds = ("files", "validation_files")
    paths = [path for source in sources for kind in kinds for path in source.get(kind) or ()]
    stamps = [_stamp(Path(path)) for path in paths]
    return _digest([asdict(job.model), data, stamps, trainer, job.seed, versions()])


def trial_key(job_name: str, plan: FoldPlan, *, num_steps: int, seed: int) -> str:
    """Name a short run.

    Args:
        job_name: From `job_key`.
        plan: What it trains by. Of the memory options the dtype of the state alone counts: the
            others change the loss by rounding.
        num_steps: Optimizer steps.
        seed: Of weights and data.
    """
    levels, scales = dict(plan.levels), dict(plan.scales)
    return _digest(
        [job_name, levels, scales, plan.lr, plan.memory_options.state_dtype, num_steps, seed]
    )


def load_earlier_trials(databases: Iterable[Path], job_name: str) -> EarlierTrials:
    """Collect what earlier searches of a job left.

    Args:
        databases: The sqlite files of their studies; one that cannot be read is passed over.
        job_name: From `job_key`.
    """
    runs: dict[str, TrialResult] = {}
    params: dict[str, list[Params]] = {}
    for database in databases:
        for study, trial in _trials(database):
            runs[trial.user_attrs["run"]] = trial_result(trial)
            if trial.user_attrs.get("job") == job_name:
                params.setdefault(study, []).append(trial.params)
    return EarlierTrials(runs, params)


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


class JsonStore:
    """What was measured, by key, in one JSON file, which is whole at every moment.

    Args:
        path: The file; it need not exist. None keeps nothing beyond this object.

    Raises:
        ConfigError: It holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[str, Any] = {}
        if path is not None and path.exists():
            try:
                self._entries = dict(json.loads(path.read_text(encoding="utf-8")).items())
            except (OSError, ValueError, AttributeError) as error:
                raise _not_runs(path, error) from error

    def get(self, key: str) -> Any:
        """Give what was measured under a key; None where nothing was."""
        return self._entries.get(key)

    def put(self, key: str, entry: Any) -> None:
        """Keep what was measured, as JSON values."""
        self._entries[key] = entry
        if self._path is not None:
            write_json(self._path, self._entries)

    def items(self) -> Iterable[tuple[str, Any]]:
        """Give all of it, by key."""
        return self._entries.items()

    def of(self, key: str, measure: Callable[[], Any]) -> Any:
        """Give what was measured under a key, before or now."""
        if key not in self._entries:
            self.put(key, measure())
        return self._entries[key]


class TrialStore:
    """Short runs by key, kept in the same way.

    Args:
        path: As of `JsonStore`.

    Raises:
        ConfigError: The file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._kept = JsonStore(path)
        try:
            self._runs = {key: _run_of(entry) for key, entry in self._kept.items()}
        except (TypeError, KeyError) as error:
            assert path is not None
            raise _not_runs(path, error) from error

    def get(self, key: str) -> TrialResult | None:
        """Give the run of a key; None where it was not done."""
        return self._runs.get(key)

    def put(self, key: str, about: Mapping[str, Any], run: TrialResult) -> None:
        """Keep a run.

        Args:
            key: What tells it from all others.
            about: The same for a reader.
            run: What came of it; its training curve is not kept.
        """
        self._runs[key] = run
        lists = {"nats": list(run.nats), "num_tokens": list(run.num_tokens)}
        self._kept.put(key, {**about, "loss": run.loss, **lists})


def _run_of(entry: Mapping[str, Any]) -> TrialResult:
    return TrialResult(entry["nats"], entry["num_tokens"])


def _not_runs(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} does not hold runs ({type(error).__name__}); move it away")

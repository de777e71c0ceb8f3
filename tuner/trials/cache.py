"""Results of earlier trials: read from studies and files, so that no trial runs twice."""

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

from foam_lightning.callbacks.spike_guard import LIMITS
from foam_lightning.data.own import source_file
from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from foam_lightning.settings import ModelSettings
from foam_lightning.storage.atomic import write_json
from foam_lightning.storage.contents import contents
from foam_lightning.training import versions
from tuner.trials.extrapolation import plan_for_length
from tuner.trials.runner import TrialResult, TrialRunner
from tuner.trials.study import Params, trial_result

# Trainer settings that do not affect a short run, which has its own values for them.
_IRRELEVANT_SETTINGS = {
    *("max_steps", "max_epochs", "max_time", "min_steps", "min_epochs", "callbacks", "logger"),
    *("val_check_interval", "check_val_every_n_epoch", "log_every_n_steps", "limit_val_batches"),
    *("devices", "num_nodes", "strategy", "enable_progress_bar", "enable_model_summary"),
    *("enable_checkpointing", "num_sanity_val_steps"),
}
# Those that a short run has these values of, whatever the settings say.
_FIXED_SETTINGS = {"profiler": None, "detect_anomaly": False, "enable_autolog_hparams": True}
_IRRELEVANT_DATA = {"micro_batch_size", "num_workers", "cache_dir"}
_TEXT = ("files", "validation_files", "dataset")


@dataclass(frozen=True)
class EarlierTrials:
    """Trials of earlier searches.

    Attributes:
        results: Results by `trial_key`.
        params: Parameters of finished trials of the same job by name of the study, oldest first.
    """

    results: Mapping[str, TrialResult] = field(default_factory=dict)
    params: Mapping[str, Sequence[Params]] = field(default_factory=dict)


class CachedRunner:
    """Run plans at the learning rate of their length, each plan, length and seed once.

    Args:
        runner: Runs what was not run before.
        earlier: Trials that are not run again, and parameters to start with.
        on_steps: Called with the steps of every trial that was found instead of run; `runner` has a
            callback for steps of its own.
        on_run: Called for every finished trial with its description and loss.
    """

    def __init__(
        self,
        runner: TrialRunner,
        earlier: EarlierTrials | None = None,
        *,
        on_steps: Callable[[int], None] = lambda _: None,
        on_run: Callable[[str, float], None] = lambda *_: None,
    ) -> None:
        self.job = runner.job
        self.job_key = job_key(runner.job)
        self.earlier = earlier or EarlierTrials()
        self._runner = runner
        self._results = dict(self.earlier.results)
        self._run_here: set[str] = set()
        self._on_steps = on_steps
        self._on_run = on_run

    def key(self, plan: FoldPlan, num_steps: int, seed: int) -> str:
        """Return the `trial_key` of a plan for the full run on a run of another length."""
        return self._key(self._at_length(plan, num_steps), num_steps, seed)

    def run(self, plan: FoldPlan, num_steps: int, seed: int) -> TrialResult:
        """Run a plan, unless its result is there."""
        as_run = self._at_length(plan, num_steps)
        key = self._key(as_run, num_steps, seed)
        if key not in self._results:
            self._results[key] = self._runner.run(as_run, num_steps=num_steps, seed=seed)
            self._run_here.add(key)
        return self._results[key]

    def report(
        self, description: str, plan: FoldPlan, num_steps: int, seed: int, result: TrialResult
    ) -> None:
        """Remember and report a finished trial, which another process may have run."""
        key = self.key(plan, num_steps, seed)
        self._results[key] = result
        if key not in self._run_here:
            self._on_steps(num_steps)
        self._run_here.discard(key)
        self._on_run(description, result.loss)

    def _at_length(self, plan: FoldPlan, num_steps: int) -> FoldPlan:
        return plan_for_length(plan, num_steps, self.job.trainer.max_steps)

    def _key(self, as_run: FoldPlan, num_steps: int, seed: int) -> str:
        return trial_key(self.job_key, as_run, num_steps=num_steps, seed=seed)


def job_key(job: Job) -> str:
    """Return a digest of everything, besides the plan, that the short runs of a job depend on.

    Files count by what they contain, so that an edited file is another job and a copy is not.
    """
    trainer = job.trainer.arguments.items()
    trainer_settings = {key: value for key, value in trainer if key not in _IRRELEVANT_SETTINGS}
    trainer_settings |= _FIXED_SETTINGS
    model = asdict(job.model) | _by_contents(vars(job.model), "pretrained")
    # Only a full run is guarded. The defaults stay, by which older trials are found.
    model |= {name: getattr(ModelSettings, name) for name in LIMITS}
    if job.model.weights_dtype is None:  # as before there was this setting
        del model["weights_dtype"]
    if not job.model.grad_offload:
        del model["grad_offload"]
    data = {key: value for key, value in asdict(job.data).items() if key not in _IRRELEVANT_DATA}
    data |= _by_contents(data, *_TEXT, "tokenizer")
    if job.data.sources is not None:
        data["sources"] = [dict(one) | _by_contents(one, *_TEXT) for one in job.data.sources]
    class_path, init_args = data.pop("class_path"), data.pop("init_args") or {}
    if class_path is not None:  # older trials have neither
        data["class_path"] = [class_path, contents(source_file(class_path) or class_path)]
        data["init_args"] = {**init_args, **_by_contents(init_args, *init_args)}
    if job.data.streaming:  # rows then come in the order of the workers
        data["num_workers"] = job.data.num_workers
    device = "cpu" if job.gpu is None else job.gpu.name
    return _digest([model, data, trainer_settings, job.seed, device, versions()])


def _by_contents(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return those of the settings that name files, each with what its files contain."""

    def replaced(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [replaced(one) for one in value]
        return contents(value) or value if isinstance(value, str) else value

    return {name: replaced(settings[name]) for name in names if name in settings}


def trial_key(job_name: str, plan: FoldPlan, *, num_steps: int, seed: int) -> str:
    """Return a digest of a short run.

    Args:
        job_name: From `job_key`.
        plan: The plan. Of its memory options only the dtype of the state counts: the others change
            the loss by rounding.
        num_steps: Optimizer steps.
        seed: Seed of weights and data.
    """
    levels, scales = dict(plan.levels), dict(plan.scales)
    return _digest(
        [job_name, levels, scales, plan.lr, plan.memory_options.state_dtype, num_steps, seed]
    )


def load_earlier_trials(databases: Iterable[Path], job_name: str) -> EarlierTrials:
    """Read the trials of earlier searches.

    Args:
        databases: The sqlite files of the studies; files that cannot be read are skipped.
        job_name: From `job_key`; the parameters of other jobs are left out.
    """
    results: dict[str, TrialResult] = {}
    params: dict[str, list[Params]] = {}
    for database in databases:
        for study, trial in _finished_trials(database):
            results[trial.user_attrs["run"]] = trial_result(trial)
            if trial.user_attrs.get("job") == job_name:
                params.setdefault(study, []).append(trial.params)
    return EarlierTrials(results, params)


def _finished_trials(database: Path) -> list[tuple[str, FrozenTrial]]:
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
    # Of another version of Optuna, or no study at all.
    except (SQLAlchemyError, OptunaError, RuntimeError, KeyError):
        return []


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str, sort_keys=True).encode()).hexdigest()[
        :16
    ]


class TrialStore:
    """Results of short runs in one JSON file, which is complete at every moment.

    Args:
        path: The file; it need not exist. None keeps the results in memory only.

    Raises:
        ConfigError: The file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[str, Any] = {}
        self._results: dict[str, TrialResult] = {}
        if path is None or not path.exists():
            return
        try:
            self._entries = dict(json.loads(path.read_text(encoding="utf-8")).items())
            self._results = {
                key: TrialResult(entry["nats"], entry["num_tokens"])
                for key, entry in self._entries.items()
            }
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path} does not hold runs ({type(error).__name__}); move it away"
            ) from error

    def get(self, key: str) -> TrialResult | None:
        """Return the result of a key; None if there is none."""
        return self._results.get(key)

    def put(self, key: str, about: Mapping[str, Any], result: TrialResult) -> None:
        """Save a result.

        Args:
            key: Identifies the run.
            about: Describes the run for a human reader of the file.
            result: The result; its training curve is not saved.
        """
        self._results[key] = result
        lists = {"nats": list(result.nats), "num_tokens": list(result.num_tokens)}
        self._entries[key] = {**about, "loss": result.loss, **lists}
        if self._path is not None:
            write_json(self._path, self._entries)

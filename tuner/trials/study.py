"""The search as Optuna studies in one sqlite file, shared by workers and resumed after a kill."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from foam_lightning.storage.atomic import atomic_path
from tuner.trials.runner import TrialResult
from tuner.trials.workers import Worker

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_SQLITE_TIMEOUT_SECONDS = 600  # a write of another process takes milliseconds
Params = dict[str, Any]


class Study:
    """One stage of the search.

    Workers start and finish trials one at a time, and a running trial carries the name of its
    worker. If that worker is no longer alive, the trial is marked as failed, and the next worker
    starts a new one with the same parameters.

    A trial depends only on the trials before it: the sampler is seeded anew with their number. So
    a search with one worker that is killed and resumed ends as one that ran through. With several
    workers the result depends on their speed.

    Args:
        path: The sqlite file, shared by all stages.
        name: The name of the stage.
        seed: Seeds the sampler.
        worker: This process among those that share the search; by default the only one.
        about: What the stage looks for, shown by other tools that open the study.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        seed: int,
        worker: Worker | None = None,
        about: str | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._name = name
        self._seed = seed
        self._worker = worker or Worker(path.parent, "tune")
        with self._worker.turn():
            if not path.exists():
                _create_database(path)
            engine_kwargs = {"connect_args": {"timeout": _SQLITE_TIMEOUT_SECONDS}}
            self._study = optuna.create_study(
                study_name=name,
                storage=RDBStorage(f"sqlite:///{path}", engine_kwargs=engine_kwargs),
                load_if_exists=True,
                pruner=optuna.pruners.NopPruner(),
            )
            if about is not None and "about" not in self._study.user_attrs:
                self._study.set_user_attr("about", about)

    def search(
        self,
        openers: Sequence[Params],
        *,
        num_trials: int,
        evaluate: Callable[[optuna.Trial], TrialResult],
        on_trial: Callable[[FrozenTrial], None] = lambda _: None,
    ) -> None:
        """Run trials until enough are finished, by this and all other workers.

        Args:
            openers: Parameters of the first trials; the sampler chooses those of the others.
            num_trials: Number of finished trials to reach, including those of earlier processes.
            evaluate: Suggests parameters to the trial and runs it.
            on_trial: Called for every finished trial of any worker, in the order of their numbers;
                those found finished come first.
        """
        num_reported = 0

        def report() -> None:
            nonlocal num_reported
            # Trials after a running one wait for it, so that the order is always the same.
            states = (*_FINISHED, TrialState.RUNNING, TrialState.WAITING)
            trials = self._study.get_trials(states=states)
            settled = list(takewhile(lambda trial: trial.state in _FINISHED, trials))
            for trial in settled[num_reported:]:
                on_trial(trial)
            num_reported = len(settled)

        self._run_all(lambda: self._start_next(openers, num_trials), evaluate, report)

    def run_named(
        self,
        names: Sequence[str],
        run: Callable[[str], TrialResult],
        on_run: Callable[[str, TrialResult], None] = lambda *_: None,
    ) -> dict[str, TrialResult]:
        """Run trials without a sampler, each once, by any worker.

        Args:
            names: One name per trial.
            run: Runs the trial of a name.
            on_run: Called with every name and result of any worker, in the order of `names`.

        Returns:
            The results by name, in the order of `names`, diverged ones included.
        """
        found: dict[str, TrialResult] = {}
        num_reported = 0

        def report() -> None:
            nonlocal num_reported
            found.update(
                (trial.user_attrs["run"], trial_result(trial)) for trial in self.finished_trials()
            )
            for name in takewhile(found.__contains__, names[num_reported:]):
                on_run(name, found[name])
                num_reported += 1

        self._run_all(
            lambda: self._start_next_named(names),
            lambda trial: run(trial.user_attrs["run"]),
            report,
        )
        return {name: found[name] for name in names}

    def finished_trials(self) -> list[FrozenTrial]:
        """List the finished trials, oldest first, diverged ones included."""
        return list(self._study.get_trials(states=_FINISHED))

    def best_trial(
        self, where: Callable[[FrozenTrial], bool] = lambda _: True
    ) -> FrozenTrial | None:
        """Return the trial of the lowest loss for which `where` holds; None if there is none."""
        trials = self.finished_trials()
        complete = [t for t in trials if t.state is TrialState.COMPLETE and where(t)]
        return min(complete, key=lambda t: (t.values[0], t.number), default=None)

    def _run_all(
        self,
        start_next: Callable[[], optuna.Trial | None],
        evaluate: Callable[[optuna.Trial], TrialResult],
        report: Callable[[], None],
    ) -> None:
        """Start and finish trials until none is left to start, and none runs elsewhere."""
        while True:
            with self._worker.turn():
                trial = start_next()
                others = [] if trial else [t.user_attrs["worker"] for t in self._running_trials()]
            report()
            if trial is not None:
                self._finish(trial, evaluate(trial))
            elif others:
                self._worker.wait_for(others, f"the stage {self._name!r} of the search")
            else:
                return

    # ---- called in the turn of the worker

    def _start_next(self, openers: Sequence[Params], num_trials: int) -> optuna.Trial | None:
        for trial in self._abandoned_trials():
            self._fail_and_requeue(trial)
        states = Counter(trial.state for trial in self._study.get_trials(deepcopy=False))
        num_started = sum(states[state] for state in (*_FINISHED, TrialState.RUNNING))
        if num_started >= num_trials:
            return None
        if not states[TrialState.WAITING] and num_started < len(openers):
            self._enqueue(openers[num_started])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.sampler = TPESampler(
                seed=(self._seed * 10_007 + num_started) % 2**32,  # the limit of numpy's seeds
                n_startup_trials=max(1, len(openers)),
                multivariate=True,
            )
        return self._start_trial()

    def _start_next_named(self, names: Sequence[str]) -> optuna.Trial | None:
        for trial in self._abandoned_trials():
            self._study.tell(trial.number, state=TrialState.FAIL)
        trials = self._study.get_trials(deepcopy=False, states=(*_FINISHED, TrialState.RUNNING))
        started = {trial.user_attrs["run"] for trial in trials}
        name = next((name for name in names if name not in started), None)
        return None if name is None else self._start_trial(run=name)

    def _start_trial(self, **attributes: str) -> optuna.Trial:
        trial = self._study.ask()
        for key, value in {**attributes, "worker": self._worker.name}.items():
            trial.set_user_attr(key, value)
        return trial

    def _abandoned_trials(self) -> list[FrozenTrial]:
        """List the running trials of dead workers, and of this one, which runs none now."""

        def is_abandoned(trial: FrozenTrial) -> bool:
            worker = trial.user_attrs.get("worker", self._worker.name)
            return worker == self._worker.name or not self._worker.is_alive(worker)

        return [trial for trial in self._running_trials() if is_abandoned(trial)]

    def _running_trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _fail_and_requeue(self, trial: FrozenTrial) -> None:
        """Queue the parameters of a trial again, then mark it as failed.

        In this order a kill in between loses nothing: the queued trial says what it repeats.
        """
        trials = self._study.get_trials(deepcopy=False)
        if all(other.user_attrs.get("repeats") != trial.number for other in trials):
            given = trial.user_attrs.get("given", {})
            self._enqueue({**given, **trial.params}, repeats=trial.number)
        self._study.tell(trial.number, state=TrialState.FAIL)

    def _enqueue(self, params: Params, **attributes: int) -> None:
        self._study.enqueue_trial(params, user_attrs={"given": params, **attributes})

    def _finish(self, trial: optuna.Trial, result: TrialResult) -> None:
        with self._worker.turn():
            for key, value in asdict(result).items():
                trial.set_user_attr(key, value)
            if math.isnan(result.loss):  # it diverged
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                self._study.tell(trial, result.loss)


def _create_database(path: Path) -> None:
    """Create the file with all its tables.

    Optuna creates an index after its table. If it were killed in between, the index would never be
    created, and one name could stand for two studies.
    """
    with atomic_path(path, exclusive=True) as temporary:
        temporary.touch()  # sqlite would not let the group write, whatever the umask says
        RDBStorage(f"sqlite:///{temporary}").engine.dispose()


def trial_result(trial: FrozenTrial) -> TrialResult:
    """Read the result of a finished trial."""
    return TrialResult(**{f.name: trial.user_attrs[f.name] for f in fields(TrialResult)})

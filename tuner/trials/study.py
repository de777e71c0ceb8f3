"""The search as Optuna studies in one sqlite file: shared by workers, and nothing kills it."""

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
# How long sqlite waits for another process that writes, which takes milliseconds.
_PATIENCE_SECONDS = 600
Params = dict[str, Any]


class Study:
    """One stage of the search.

    A worker takes a trial up and finishes it in its turn, and a trial under way carries the name
    of its worker. Where that one is gone the trial is failed, and the next worker begins a new one
    with the same parameters.

    A trial depends on nothing but the trials before it: the sampler is seeded anew by their
    number. So a search with one worker that was killed ends as one that was not; with several it
    depends on who is faster.

    Args:
        path: The sqlite file, shared by all stages.
        name: The stage.
        seed: Seeds the sampler.
        worker: Who works on it here; by default one that no other worker waits for.
        about: What is looked for, for whoever opens the study elsewhere.
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
                _make(path)
            self._study = optuna.create_study(
                study_name=name,
                storage=RDBStorage(
                    f"sqlite:///{path}",
                    engine_kwargs={"connect_args": {"timeout": _PATIENCE_SECONDS}},
                ),
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
        """Run trials until so many are finished, those of other workers included.

        Args:
            openers: Parameters of the first trials; the sampler chooses the rest.
            num_trials: Finished trials to end with, those of earlier processes included.
            evaluate: Asks the trial for its parameters and runs them.
            on_trial: Called with every finished trial, whoever ran it, in the order of their
                numbers; at once with those found finished.
        """
        num_shown = 0

        def show() -> None:
            nonlocal num_shown
            # What follows a trial under way waits for it, so that the order is always the same.
            states = (*_FINISHED, TrialState.RUNNING, TrialState.WAITING)
            trials = self._study.get_trials(states=states)
            settled = list(takewhile(lambda trial: trial.state in _FINISHED, trials))
            for trial in settled[num_shown:]:
                on_trial(trial)
            num_shown = len(settled)

        self._work(lambda: self._next_trial(openers, num_trials), evaluate, show)

    def do(
        self,
        names: Sequence[str],
        run: Callable[[str], TrialResult],
        on_run: Callable[[str, TrialResult], None] = lambda *_: None,
    ) -> dict[str, TrialResult]:
        """Do runs that no sampler asks for, each once, by whichever worker.

        Args:
            names: What tells them apart.
            run: Does the run of a name.
            on_run: Called with every name and run, whoever did it, in the order of `names`.

        Returns:
            The runs by name, in the order of `names`; one may have diverged.
        """
        found: dict[str, TrialResult] = {}
        num_shown = 0

        def show() -> None:
            nonlocal num_shown
            found.update(
                (trial.user_attrs["run"], trial_result(trial)) for trial in self.finished()
            )
            for name in takewhile(found.__contains__, names[num_shown:]):
                on_run(name, found[name])
                num_shown += 1

        self._work(lambda: self._next_name(names), lambda asked: run(asked.user_attrs["run"]), show)
        return {name: found[name] for name in names}

    def finished(self) -> list[FrozenTrial]:
        """List the finished trials, oldest first."""
        return list(self._study.get_trials(states=_FINISHED))

    def best(self, where: Callable[[FrozenTrial], bool] = lambda _: True) -> FrozenTrial | None:
        """Find the trial of the lowest loss among those that hold; None if there is none."""
        done = [t for t in self.finished() if t.state is TrialState.COMPLETE and where(t)]
        return min(done, key=lambda t: (t.values[0], t.number), default=None)

    def _work(
        self,
        take: Callable[[], optuna.Trial | None],
        evaluate: Callable[[optuna.Trial], TrialResult],
        show: Callable[[], None],
    ) -> None:
        """Take trials up and finish them until none is left, and none under way elsewhere."""
        while True:
            with self._worker.turn():
                asked = take()
                others = [] if asked else [t.user_attrs["worker"] for t in self._under_way()]
            show()
            if asked is not None:
                self._finish(asked, evaluate(asked))
            elif others:
                self._worker.wait_for(others, f"the stage {self._name!r}")
            else:
                return

    # ---- in the worker's turn

    def _next_trial(self, openers: Sequence[Params], num_trials: int) -> optuna.Trial | None:
        for trial in self._abandoned():
            self._repeat(trial)
        states = Counter(trial.state for trial in self._study.get_trials(deepcopy=False))
        num_begun = sum(states[state] for state in (*_FINISHED, TrialState.RUNNING))
        if num_begun >= num_trials:
            return None
        if not states[TrialState.WAITING] and num_begun < len(openers):
            self._enqueue(openers[num_begun])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.sampler = TPESampler(
                seed=(self._seed * 10_007 + num_begun) % 2**32,  # numpy takes no more
                n_startup_trials=max(1, len(openers)),
                multivariate=True,
            )
        return self._ask()

    def _next_name(self, names: Sequence[str]) -> optuna.Trial | None:
        for trial in self._abandoned():
            self._study.tell(trial.number, state=TrialState.FAIL)
        trials = self._study.get_trials(deepcopy=False, states=(*_FINISHED, TrialState.RUNNING))
        begun = {trial.user_attrs["run"] for trial in trials}
        name = next((name for name in names if name not in begun), None)
        return None if name is None else self._ask(run=name)

    def _ask(self, **attributes: str) -> optuna.Trial:
        asked = self._study.ask()
        for key, value in {**attributes, "worker": self._worker.name}.items():
            asked.set_user_attr(key, value)
        return asked

    def _abandoned(self) -> list[FrozenTrial]:
        """List the trials under way whose worker is gone, or is this one, which runs none now."""

        def is_worked_on(trial: FrozenTrial) -> bool:
            worker = trial.user_attrs.get("worker", self._worker.name)
            return worker != self._worker.name and self._worker.is_alive(worker)

        return [trial for trial in self._under_way() if not is_worked_on(trial)]

    def _under_way(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _repeat(self, trial: FrozenTrial) -> None:
        """Let a trial's parameters be run by the next that asks, and fail it, in this order."""
        trials = self._study.get_trials(deepcopy=False)
        if all(other.user_attrs.get("repeats") != trial.number for other in trials):
            given = trial.user_attrs.get("given", {})
            self._enqueue({**given, **trial.params}, repeats=trial.number)
        self._study.tell(trial.number, state=TrialState.FAIL)

    def _enqueue(self, params: Params, **attributes: int) -> None:
        self._study.enqueue_trial(params, user_attrs={"given": params, **attributes})

    def _finish(self, asked: optuna.Trial, run: TrialResult) -> None:
        with self._worker.turn():
            for key, value in asdict(run).items():
                asked.set_user_attr(key, value)
            if run.loss == run.loss:
                self._study.tell(asked, run.loss)
            else:  # not a number: it diverged
                self._study.tell(asked, state=TrialState.PRUNED)


def _make(path: Path) -> None:
    """Create the file with all its tables.

    Optuna creates an index after its table. If it were killed in between, the index would never be
    created, and one name could stand for two studies.
    """
    with atomic_path(path, exclusive=True) as temporary:
        temporary.touch()  # sqlite would not let the group write, whatever the umask says
        RDBStorage(f"sqlite:///{temporary}").engine.dispose()


def trial_result(trial: FrozenTrial) -> TrialResult:
    """Read a trial's short run back."""
    return TrialResult(
        **{field.name: trial.user_attrs[field.name] for field in fields(TrialResult)}
    )

"""A study: the order of its trials, what survives a kill, and what other tools see in the file."""

import math
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import Engine, event

from tuner.trials.runner import TrialResult
from tuner.trials.study import Params, Study, trial_result

OPENERS: list[Params] = [{"level": 2, "x": 0.5}, {"level": 0, "x": 1.5}]
TRIALS = 9
NewStudy = Callable[..., Study]


def result(loss: float) -> TrialResult:
    return TrialResult([loss * 4, loss * 4], [4, 4])


def bowl(trial: optuna.Trial) -> TrialResult:
    level = trial.suggest_categorical("level", [0, 1, 2])
    x = trial.suggest_float("x", 0.1, 10, log=True)
    return result(3 + (math.log(x) - 0.3) ** 2 + 0.1 * abs(level - 1))


class KilledError(BaseException):
    """No code catches a kill."""


def kill_at(number: int) -> Callable[[optuna.Trial], TrialResult]:
    """Evaluate until the process dies in the middle of this trial."""
    left = count(-number)

    def evaluate(trial: optuna.Trial) -> TrialResult:
        found = bowl(trial)
        if next(left) == 0:
            raise KilledError
        return found

    return evaluate


@pytest.fixture
def kill_before(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that lets the process die before the n-th call of Optuna from now on."""
    left = math.inf

    def set_left(number: float) -> None:
        nonlocal left
        left = number

    def counted(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                raise KilledError
            return method(*args, **kwargs)

        return call

    for owner, names in (
        (optuna.Study, ("enqueue_trial", "ask", "tell")),
        (optuna.Trial, ("suggest_categorical", "suggest_float", "set_user_attr")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return set_left


@pytest.fixture
def new_study(tmp_path: Path) -> NewStudy:
    """Open a study of one file as a new process would."""

    def new(name: str = "uniform", *, seed: int = 1, about: str | None = None) -> Study:
        return Study(tmp_path / "study.db", name, seed=seed, about=about)

    return new


def search(study: Study, evaluate: Any = bowl, num_trials: int = TRIALS) -> list[Params]:
    study.search(OPENERS, num_trials=num_trials, evaluate=evaluate)
    return [trial.params for trial in study.finished_trials()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Params]:
    return search(Study(tmp_path_factory.mktemp("study") / "study.db", "uniform", seed=1))


def test_openers_come_first_and_then_the_sampler_by_its_seed(
    new_study: NewStudy, undisturbed: list[Params]
) -> None:
    assert undisturbed[:2] == OPENERS
    assert len({str(params) for params in undisturbed}) == len(undisturbed) == TRIALS
    other = search(new_study(seed=2))
    assert other[:2] == OPENERS
    assert other != undisturbed


def test_a_search_killed_between_any_two_calls_ends_as_one_that_was_not(
    new_study: NewStudy, undisturbed: list[Params], kill_before: Callable[[float], None]
) -> None:
    names = ["a plan", "another"]

    def all_stages() -> list[Params]:
        found = search(new_study(), num_trials=4)
        new_study("final").run_named(names, lambda _: result(3.0))
        return found

    num_kills = 0
    for step in count(1):
        kill_before(step)
        try:
            found = all_stages()
            break
        except KilledError:
            num_kills += 1
    kill_before(math.inf)
    assert num_kills > 9
    assert found == undisturbed[:4]
    finals = new_study("final").finished_trials()
    assert [trial.user_attrs["run"] for trial in finals] == names


def test_a_kill_while_the_file_is_created_leaves_no_incomplete_file(
    new_study: NewStudy, tmp_path: Path
) -> None:
    def die(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("CREATE UNIQUE INDEX"):
            raise KilledError

    event.listen(Engine, "before_cursor_execute", die)
    try:
        with pytest.raises(KilledError):
            new_study()
    finally:
        event.remove(Engine, "before_cursor_execute", die)
    assert not (tmp_path / "study.db").exists()
    for _ in range(2):
        new_study()
    assert optuna.get_all_study_names(f"sqlite:///{tmp_path / 'study.db'}") == ["uniform"]
    assert [found.name for found in tmp_path.glob("study*")] == ["study.db"]


def test_a_trial_that_diverged_is_finished_but_never_the_best(new_study: NewStudy) -> None:
    study = new_study()

    def evaluate(trial: optuna.Trial) -> TrialResult:
        found = bowl(trial)
        return result(math.nan) if trial.params["level"] == 2 else found

    search(study, evaluate)
    first, *_ = study.finished_trials()
    assert first.state is TrialState.PRUNED
    assert math.isnan(trial_result(first).loss)
    best = study.best_trial()
    assert best is not None
    assert best.params["level"] != 2
    assert study.best_trial(lambda trial: trial.params["level"] == 2) is None


def test_every_trial_is_reported_once_and_finished_ones_first(new_study: NewStudy) -> None:
    search(new_study(), num_trials=3)
    reported: list[int] = []
    new_study().search(
        OPENERS,
        num_trials=5,
        evaluate=bowl,
        on_trial=lambda trial: reported.append(trial.number),
    )
    assert reported == [0, 1, 2, 3, 4]


def test_the_best_is_the_earliest_of_the_lowest(new_study: NewStudy) -> None:
    study = new_study()
    assert study.best_trial() is None
    search(study, lambda trial: bowl(trial) and result(3.0), num_trials=4)
    best = [study.best_trial(), study.best_trial(lambda trial: trial.number > 1)]
    assert [trial and trial.number for trial in best] == [0, 2]
    assert new_study("mixed").finished_trials() == []


def test_other_tools_see_what_was_given_and_what_was_repeated(
    new_study: NewStudy, tmp_path: Path
) -> None:
    for attempt in (kill_at(1), bowl):
        with suppress(KilledError):
            search(new_study(about="all at once"), attempt, num_trials=3)
    opened = optuna.load_study(study_name="uniform", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert opened.user_attrs == {"about": "all at once"}
    assert [(trial.number, trial.state) for trial in opened.trials] == [
        (0, TrialState.COMPLETE),
        (1, TrialState.FAIL),
        (2, TrialState.COMPLETE),
        (3, TrialState.COMPLETE),
    ]
    first, dead, again, sampled = (trial.user_attrs for trial in opened.trials)
    assert [first["given"], dead["given"], again["given"]] == [OPENERS[0], OPENERS[1], OPENERS[1]]
    assert again["repeats"] == 1
    assert "given" not in sampled
    assert len({attrs["worker"] for attrs in (first, dead)}) == 1
    assert len({attrs["worker"] for attrs in (dead, again, sampled)}) == 2


def test_named_trials_run_once(new_study: NewStudy) -> None:
    losses = {"a plan": 3.25, "another": math.nan, "a third": 3.5}
    names: list[str] = []

    def run(name: str) -> TrialResult:
        names.append(name)
        return result(losses[name])

    first = new_study("final").run_named(["a plan", "another"], run)
    assert (first["a plan"], names) == (result(3.25), ["a plan", "another"])
    reported: list[str] = []
    found = new_study("final").run_named(
        ["a third", "another", "a plan"], run, lambda name, _: reported.append(name)
    )
    assert names == ["a plan", "another", "a third"]
    assert list(found) == reported == ["a third", "another", "a plan"]
    assert math.isnan(found["another"].loss)
    assert (found["a plan"], found["a third"]) == (result(3.25), result(3.5))

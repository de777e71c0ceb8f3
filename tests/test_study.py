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


def run_at(loss: float) -> TrialResult:
    return TrialResult([loss * 4, loss * 4], [4, 4])


def bowl(trial: optuna.Trial) -> TrialResult:
    level = trial.suggest_categorical("level", [0, 1, 2])
    x = trial.suggest_float("x", 0.1, 10, log=True)
    return run_at(3 + (math.log(x) - 0.3) ** 2 + 0.1 * abs(level - 1))


class KilledError(BaseException):
    """Nobody catches a kill."""


@pytest.fixture
def killed_before(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Give `killed_before(n)`: the process dies before the n-th thing that it asks of Optuna."""
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


def killed_at(number: int) -> Callable[[optuna.Trial], TrialResult]:
    """Evaluate until the process dies in the middle of this trial."""
    done = 0

    def evaluate(trial: optuna.Trial) -> TrialResult:
        nonlocal done
        run = bowl(trial)
        if done == number:
            raise KilledError
        done += 1
        return run

    return evaluate


def search(study: Study, evaluate: Any = bowl, num_trials: int = TRIALS) -> None:
    study.search(OPENERS, num_trials=num_trials, evaluate=evaluate)


def params_of(study: Study) -> list[Params]:
    return [trial.params for trial in study.finished()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Params]:
    study = Study(tmp_path_factory.mktemp("study") / "study.db", "uniform", seed=1)
    search(study)
    return params_of(study)


def test_openers_come_first_and_the_sampler_learns(undisturbed: list[Params]) -> None:
    assert undisturbed[:2] == OPENERS
    assert len(undisturbed) == TRIALS
    assert len({str(params) for params in undisturbed}) == TRIALS


@pytest.mark.parametrize("kills", [[0], [4, 0, 3]])
def test_a_search_that_was_killed_ends_as_one_that_was_not(
    tmp_path: Path, undisturbed: list[Params], kills: list[int]
) -> None:
    path = tmp_path / "study.db"
    for number in kills:
        with pytest.raises(KilledError):
            search(Study(path, "uniform", seed=1), killed_at(number))
    study = Study(path, "uniform", seed=1)
    search(study)
    assert params_of(study) == undisturbed


def test_a_search_goes_on_in_the_same_process(tmp_path: Path, undisturbed: list[Params]) -> None:
    study = Study(tmp_path / "study.db", "uniform", seed=1)
    search(study, num_trials=4)
    search(study)
    search(study)  # nothing left to do
    assert params_of(study) == undisturbed


def test_a_search_killed_between_any_two_steps_ends_as_one_that_was_not(
    tmp_path: Path, undisturbed: list[Params], killed_before: Callable[[float], None]
) -> None:
    path, names = tmp_path / "study.db", ["a plan", "another"]

    def all_stages() -> list[Params]:
        study = Study(path, "uniform", seed=1)
        search(study, num_trials=4)
        Study(path, "final", seed=1).do(names, lambda _: run_at(3.0))
        return params_of(study)

    num_kills = 0
    for step in count(1):
        killed_before(step)
        try:
            found = all_stages()
            break
        except KilledError:
            num_kills += 1
    killed_before(math.inf)
    assert num_kills > 9
    assert found == undisturbed[:4]
    finals = Study(path, "final", seed=1).finished()
    assert [trial.user_attrs["run"] for trial in finals] == names


def test_a_kill_while_the_file_is_made_leaves_none_that_is_half_made(tmp_path: Path) -> None:
    path = tmp_path / "study.db"

    def die(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("CREATE UNIQUE INDEX"):
            raise KilledError

    event.listen(Engine, "before_cursor_execute", die)
    try:
        with pytest.raises(KilledError):
            Study(path, "uniform", seed=1)
    finally:
        event.remove(Engine, "before_cursor_execute", die)
    assert not path.exists()
    for _ in range(2):
        Study(path, "uniform", seed=1)
    assert optuna.get_all_study_names(f"sqlite:///{path}") == ["uniform"]
    assert [found.name for found in tmp_path.glob("study*")] == ["study.db"]


def test_another_seed_is_another_search(tmp_path: Path, undisturbed: list[Params]) -> None:
    study = Study(tmp_path / "study.db", "uniform", seed=2)
    search(study)
    assert params_of(study)[:2] == undisturbed[:2]
    assert params_of(study) != undisturbed


def test_a_run_that_diverged_is_finished_but_never_the_best(tmp_path: Path) -> None:
    study = Study(tmp_path / "study.db", "uniform", seed=1)

    def evaluate(trial: optuna.Trial) -> TrialResult:
        run = bowl(trial)
        return run_at(math.nan) if trial.params["level"] == 2 else run

    search(study, evaluate)
    first, *_ = study.finished()
    assert first.state is TrialState.PRUNED
    assert math.isnan(trial_result(first).loss)
    best = study.best()
    assert best is not None
    assert best.params["level"] != 2
    assert study.best(lambda trial: trial.params["level"] == 2) is None


def test_every_trial_is_shown_once_and_those_found_at_once(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    search(Study(path, "uniform", seed=1), num_trials=3)
    shown: list[int] = []
    Study(path, "uniform", seed=1).search(
        OPENERS,
        num_trials=5,
        evaluate=bowl,
        on_trial=lambda trial: shown.append(trial.number),
    )
    assert shown == [0, 1, 2, 3, 4]


def test_the_best_is_the_earliest_of_the_lowest(tmp_path: Path) -> None:
    study = Study(tmp_path / "study.db", "uniform", seed=1)
    assert study.best() is None
    search(study, lambda trial: bowl(trial) and run_at(3.0), num_trials=4)
    best = study.best()
    assert best is not None
    assert best.number == 0
    later = study.best(lambda trial: trial.number > 1)
    assert later is not None
    assert later.number == 2


def test_stages_share_a_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    search(Study(path, "uniform", seed=1), num_trials=2)
    assert Study(path, "mixed", seed=1).finished() == []
    assert len(Study(path, "uniform", seed=1).finished()) == 2


def test_whoever_opens_the_file_sees_what_was_given_and_what_was_repeated(
    tmp_path: Path,
) -> None:
    path = tmp_path / "study.db"
    for attempt in (killed_at(1), bowl):
        study = Study(path, "uniform", seed=1, about="all at once")
        with suppress(KilledError):
            search(study, attempt, num_trials=3)
    opened = optuna.load_study(study_name="uniform", storage=f"sqlite:///{path}")
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


def test_named_runs_are_done_once(tmp_path: Path) -> None:
    path, losses = tmp_path / "study.db", {"a plan": 3.25, "another": math.nan, "a third": 3.5}
    asked: list[str] = []

    def run(name: str) -> TrialResult:
        asked.append(name)
        return run_at(losses[name])

    first = Study(path, "final", seed=1).do(["a plan", "another"], run)
    assert (first["a plan"], asked) == (run_at(3.25), ["a plan", "another"])
    told: list[str] = []
    found = Study(path, "final", seed=1).do(
        ["a third", "another", "a plan"], run, lambda name, _: told.append(name)
    )
    assert asked == ["a plan", "another", "a third"]
    assert list(found) == told == ["a third", "another", "a plan"]
    assert math.isnan(found["another"].loss)
    assert (found["a plan"], found["a third"]) == (run_at(3.25), run_at(3.5))

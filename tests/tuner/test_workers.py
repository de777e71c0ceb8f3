"""Workers that share a search: which is alive, which leads, and that each trial runs once."""

import errno
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import optuna
import pytest
from filelock import FileLock

from foam_lightning.errors import ConfigError
from tuner.trials import workers
from tuner.trials.runner import TrialResult
from tuner.trials.study import Params, Study
from tuner.trials.workers import Worker

# Processes that start with all modules loaded, including those that Optuna loads lazily.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__, "alembic.command", "sqlalchemy.orm"])
OPENERS: list[Params] = [{"level": 2, "x": 0.5}, {"level": 0, "x": 1.5}]
NAMES = ["a plan", "another", "a third"]
Start = Callable[..., ForkServerProcess]


def note(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def notes(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def work(folder: Path, *, num_trials: int, seconds: float) -> None:
    """Do the whole search as one process of several, and write down what it starts and reports."""
    seen: list[int] = []

    def evaluate(trial: optuna.Trial) -> TrialResult:
        level = trial.suggest_categorical("level", [0, 1, 2])
        x = trial.suggest_float("x", 0.1, 10, log=True)
        note(folder / "begun", json.dumps([os.getpid(), trial.number, trial.params]))
        time.sleep(seconds)
        loss = 3 + (math.log(x) - 0.3) ** 2 + 0.1 * abs(level - 1)
        return TrialResult([loss * 4, loss * 4], [4, 4])

    def run(name: str) -> TrialResult:
        note(folder / "begun", json.dumps([os.getpid(), name, {}]))
        time.sleep(seconds)
        return TrialResult([12.0 + len(name)], [4])

    with Worker(folder, "tune", lambda line: note(folder / "said", line)) as worker:
        study = Study(folder / "study.db", "uniform", seed=1, worker=worker)
        study.search(
            OPENERS,
            num_trials=num_trials,
            evaluate=evaluate,
            on_trial=lambda trial: seen.append(trial.number),
        )
        Study(folder / "study.db", "final", seed=1, worker=worker).run_named(NAMES, run)
        note(folder / "seen", json.dumps(seen))
        note(folder / "is_leader", str(worker.claim_lead()))


def begun(folder: Path) -> list[Any]:
    return [json.loads(line) for line in notes(folder / "begun")]


def has_begun(folder: Path, number: int) -> bool:
    return len(begun(folder)) >= number


def num_finished(folder: Path, stage: str = "uniform") -> int:
    return len(Study(folder / "study.db", stage, seed=1).finished_trials())


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[ForkServerProcess] = []

    def start(folder: Path, **options: Any) -> ForkServerProcess:
        folder.mkdir(exist_ok=True)
        process = SERVER.Process(target=work, args=(folder,), kwargs=options)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()
        process.close()


def ends(process: ForkServerProcess) -> bool:
    process.join(120)
    return process.exitcode == 0


@pytest.mark.slow
def test_two_workers_do_every_run_once_and_one_goes_on(tmp_path: Path, start: Start) -> None:
    processes = [start(tmp_path, num_trials=10, seconds=0.2) for _ in range(2)]
    assert all(ends(process) for process in processes)
    assert num_finished(tmp_path) == 10
    done = [number for _, number, _ in begun(tmp_path)]
    assert sorted(done, key=str) == sorted([*range(10), *NAMES], key=str)
    assert {pid for pid, _, _ in begun(tmp_path)} == {process.pid for process in processes}
    assert len({str(params) for _, number, params in begun(tmp_path) if params}) == 10
    assert [json.loads(line) for line in notes(tmp_path / "seen")] == [[*range(10)]] * 2
    is_leader = notes(tmp_path / "is_leader")
    # The second may come to the end when the first has left, and finds the lead free.
    assert is_leader[0] in ("True", "False")
    assert "True" in is_leader


@pytest.mark.slow
def test_the_run_of_a_worker_that_dies_is_done_by_the_one_that_waits(
    tmp_path: Path, start: Start
) -> None:
    stuck = start(tmp_path, num_trials=4, seconds=600)
    wait_until(partial(has_begun, tmp_path, 1))
    other = start(tmp_path, num_trials=4, seconds=0)
    wait_until(lambda: any("'uniform'" in line for line in notes(tmp_path / "said")))
    name = f"tune-{stuck.pid}-"
    joined, waiting = notes(tmp_path / "said")
    assert joined.startswith(f"joined {name}")
    assert waiting.startswith(f"waiting for {name}")
    assert num_finished(tmp_path) == 3
    stuck.kill()
    assert ends(other)
    first, *rest = begun(tmp_path)
    (again,) = [number for _, number, params in rest if params == first[2]]
    assert again == 4
    assert [json.loads(line) for line in notes(tmp_path / "seen")] == [[1, 2, 3, 4]]
    assert num_finished(tmp_path, "final") == len(NAMES)
    assert notes(tmp_path / "is_leader") == ["True"]


def is_alive(worker: Worker, name: str) -> bool:
    with worker.turn():
        return worker.is_alive(name)


def test_a_worker_is_alive_from_entry_to_exit(tmp_path: Path) -> None:
    one, two = Worker(tmp_path, "tune"), Worker(tmp_path, "tune")
    assert one.name != two.name
    with one:
        assert not is_alive(one, two.name)
        with two:
            assert is_alive(one, two.name)
            assert is_alive(two, one.name)
            assert is_alive(one, one.name)
        assert not is_alive(one, two.name)
    assert sorted(path.name for path in (tmp_path / "workers").iterdir()) == [
        "leader",
        "turn.lock",
    ]


def test_a_process_that_a_worker_forks_does_not_keep_it_alive(tmp_path: Path) -> None:
    """As a DataLoader's processes would, when the one that trains is killed."""
    one, two = Worker(tmp_path, "tune"), Worker(tmp_path, "tune")
    with one:
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        try:
            assert is_alive(two, one.name)
            one._own_lock.release()  # as the system does
            assert not is_alive(two, one.name)
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)


def test_the_first_leads_until_it_ends_and_then_the_first_that_asks(tmp_path: Path) -> None:
    said: list[str] = []
    one = Worker(tmp_path, "tune", said.append)
    two, three = (Worker(tmp_path, "tune", said.append) for _ in range(2))
    with two:
        with one, three:
            assert [worker.claim_lead() for worker in (one, two, three)] == [False, True, False]
        assert two.claim_lead()
        with one:
            assert not one.claim_lead()
    with one, three:
        assert [worker.claim_lead() for worker in (three, one)] == [False, True]
    assert all(line.startswith(f"joined {two.name}") for line in said[:2])
    assert said[2].startswith(f"{two.name} continues")


def test_one_that_trains_waits_for_one_that_tunes_but_not_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    tunes, trains = Worker(tmp_path, "tune"), Worker(tmp_path, "fit", said.append)
    with tunes, trains:
        monkeypatch.setattr(workers.time, "sleep", lambda _: tunes.__exit__(None, None, None))
        assert trains.claim_lead()
        assert [line for line in said if line.startswith(f"waiting for {tunes.name}")]
        again = Worker(tmp_path, "tune")
        with again:
            assert not again.claim_lead()


def test_a_file_system_without_locks_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(ConfigError, match=r"No locks available.*--runs"):
        Worker(tmp_path, "tune").__enter__()

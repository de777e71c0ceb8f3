"""A run that a signal ends resumes at the very next step, and ends like an undisturbed one."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import cli
from foam_lightning.checkpoint.load import read_checkpoint
from foam_lightning.job import Job
from foam_lightning.signals import Interrupted, handle_signals
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.training import TrainingResult, train
from tests.support.runs import STEPS, Finished, NewJob, open_folder, small
from tests.support.tiny import write_settings
from tuner.trials.runner import TrialRunner


class Signal(Callback):
    """Send this process signals, in the middle of a step or in another hook."""

    def __init__(
        self,
        step: int,
        *numbers: signal.Signals,
        hook: str = "on_before_backward",
        to_all: bool = False,
    ) -> None:
        self._step = step
        self._numbers = list(numbers)
        self._to_all = to_all
        setattr(self, hook, self._send)

    def _send(self, trainer: Trainer, *_: Any) -> None:
        while trainer.global_step == self._step and self._numbers:
            number = self._numbers.pop(0)
            workers = multiprocessing.active_children() if self._to_all else []
            assert workers or not self._to_all
            for process in [*workers, multiprocessing.current_process()]:
                assert process.pid
                os.kill(process.pid, number)


Run = Callable[..., TrainingResult]


@pytest.fixture
def run(finished: Finished) -> Iterator[Run]:
    """Return `run(folder, job)`: train by the plan of the finished run, and handle signals."""

    def run(folder: RunFolder, job: Job) -> TrainingResult:
        with handle_signals():
            return train(job, finished.plan, folder)

    yield run
    # Lightning left no handler of its own.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def ends_alike(folder: RunFolder, trained: TrainingResult, finished: Finished) -> bool:
    expected = read_checkpoint(finished.folder.last_checkpoint)["state_dict"]
    found = read_checkpoint(folder.last_checkpoint)["state_dict"]
    return (
        trained.final_validation_loss == finished.trained.final_validation_loss
        and all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        and [path.name for path in folder.checkpoints.iterdir()] == ["last.ckpt"]
    )


EVALUATING, AT_THE_END = {"hook": "on_validation_batch_end"}, {"hook": "on_fit_end"}


@pytest.mark.parametrize(
    ("step", "numbers", "options", "words", "saved"),
    [
        (7, [signal.SIGTERM], {}, "ended by SIGTERM, saved step 8", 8),
        (8, [signal.SIGINT], EVALUATING, "ended by SIGINT, saved step 9", 9),
        (7, [signal.SIGTERM, signal.SIGINT], {}, "ended by SIGINT", 6),
        (STEPS, [signal.SIGTERM], AT_THE_END, "ended by SIGTERM", 16),
    ],
    ids=["step", "evaluation", "second signal", "end"],
)
def test_a_signal_waits_for_the_checkpoint_of_a_step_and_a_second_does_not(
    step: int,
    numbers: list[signal.Signals],
    options: dict[str, str],
    words: str,
    saved: int,
    finished: Finished,
    new_job: NewJob,
    tmp_path: Path,
    run: Run,
) -> None:
    folder = open_folder(tmp_path)
    with pytest.raises(Interrupted, match=f"^{words}$"):
        run(folder, small(new_job, callbacks=[Signal(step, *numbers, **options)]))  # type: ignore[arg-type]
    assert read_checkpoint(folder.last_checkpoint)["global_step"] == saved
    assert ends_alike(folder, run(folder, small(new_job)), finished)


def test_a_signal_to_all_processes_lets_data_workers_finish_the_step(
    finished: Finished, new_job: NewJob, tmp_path: Path, run: Run
) -> None:
    def job(*callbacks: Callback) -> Job:
        return new_job(
            data={"micro_batch_size": 4, "num_workers": 2},
            trainer={"max_steps": STEPS, "val_check_interval": 4, "callbacks": list(callbacks)},
        )

    folder = open_folder(tmp_path)
    with pytest.raises(Interrupted, match=r"saved step 3$"):
        run(folder, job(Signal(2, signal.SIGTERM, to_all=True)))
    assert ends_alike(folder, run(folder, job()), finished)


@pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself
def test_a_search_that_a_signal_ends_keeps_its_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", "--config", str(write_settings(tmp_path)), "--memory-budget", "24GB"]
    words += ["--tune.trials", "4", "--tune.steps", "4"]
    trained = TrialRunner._trained
    count = 0

    class Ends(Callback):
        def on_before_backward(self, trainer: Trainer, _: LightningModule, *__: Any) -> None:
            if count == 4 and trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    def counted(bench: TrialRunner, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        *others, callbacks = arguments
        return trained(bench, *others, [*callbacks, Ends()])

    monkeypatch.setattr(TrialRunner, "_trained", counted)
    monkeypatch.setattr("tuner.pipeline.write_report", lambda *_: {})  # its plots take seconds
    assert cli.main(words) == 143
    out, err = capfd.readouterr()
    assert err.endswith("ended by SIGTERM; run the same command again to resume\n")
    assert "Traceback" not in err
    assert len(losses(out)) == 2  # the first of the four is for the time of a step
    assert cli.main(words) == 0
    assert losses(capfd.readouterr().out)[:2] == losses(out)


def losses(out: str) -> list[str]:
    return [line for line in out.splitlines() if " loss " in line]

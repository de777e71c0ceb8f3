"""SIGINT and SIGTERM end a command at once, or are deferred; data workers outlive them."""

import os
import signal
import threading
import time

import pytest

from foam_lightning import signals
from foam_lightning.signals import (
    Interrupted,
    defer_signals,
    handle_signals,
    pending_signal,
    stop_deferring_signals,
    survive_signals,
)

BOTH = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@BOTH
def test_a_signal_ends_a_command_at_once(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"^ended by {number.name}$") as caught, handle_signals():
        send(number)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is before


@BOTH
def test_the_first_of_deferred_signals_is_recorded_and_the_second_ends_the_command(
    number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with handle_signals():
        # As Lightning sets its own.
        signal.signal(number, lambda *_: pytest.fail("the handler of another"))
        defer_signals()
        assert pending_signal() is None
        send(number)
        assert pending_signal() == number
        told = capfd.readouterr().err
        assert number.name in told
        assert "Saving a checkpoint" in told
        with pytest.raises(Interrupted) as caught:
            send(number)
        assert caught.value.exit_code == code


def test_signals_are_no_longer_deferred_after_training_and_in_the_next_command() -> None:
    with handle_signals():
        defer_signals()
        stop_deferring_signals()
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)
    with handle_signals():
        defer_signals()
        send(signal.SIGTERM)
    with handle_signals():
        assert pending_signal() is None
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)


def test_handlers_are_set_only_by_a_command_and_only_in_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    defer_signals()
    assert signal.getsignal(signal.SIGTERM) is before
    seen: list[object] = []

    def run() -> None:
        with handle_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_an_interruption_is_caught_by_no_handler_of_errors() -> None:
    assert not issubclass(Interrupted, Exception | KeyboardInterrupt)
    assert str(Interrupted(15, "saved step 3")) == "ended by SIGTERM, saved step 3"


def exit_code_of_fork(grace_seconds: int, *, is_worker: bool, work_seconds: float = 0.5) -> int:
    """Fork a process, send it both signals, and return its exit code: 7 if it outlives them."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            if is_worker:
                signals._WORKER_GRACE_SECONDS = grace_seconds
                survive_signals(0)
            os.write(told, b"x")
            until = time.monotonic() + work_seconds
            while time.monotonic() < until:
                time.sleep(0.05)
        finally:
            os._exit(7)
    os.read(ready, 1)
    os.kill(child, signal.SIGINT)
    os.kill(child, signal.SIGTERM)
    os.close(ready)
    os.close(told)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_data_workers_outlive_a_signal_for_a_while_and_other_forks_do_not() -> None:
    with handle_signals():
        defer_signals()
        assert exit_code_of_fork(60, is_worker=True) == 7
        assert exit_code_of_fork(1, is_worker=True, work_seconds=60) == -signal.SIGALRM
        assert exit_code_of_fork(60, is_worker=False) == -signal.SIGTERM
        assert pending_signal() is None  # none of them was for this process

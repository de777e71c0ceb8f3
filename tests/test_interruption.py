"""Signals: at once, or heard and waited for; and those who read data for a run."""

import os
import signal
import threading
import time

import pytest

from foam_lightning import signals as interruption
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
def test_who_waits_hears_the_first_and_is_ended_by_the_second(
    number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with handle_signals():
        defer_signals()
        assert pending_signal() is None
        send(number)
        assert pending_signal() == number
        assert capfd.readouterr().err == (
            f"\n{number.name}: saving after this step; once more ends at once\n"
        )
        with pytest.raises(Interrupted) as caught:
            send(number)
        assert caught.value.exit_code == code


def test_after_the_waiting_a_signal_ends_at_once_again() -> None:
    with handle_signals():
        defer_signals()
        stop_deferring_signals()
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)


def test_waiting_takes_the_place_of_what_lightning_has_set() -> None:
    with handle_signals():
        signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the handler of another"))
        defer_signals()
        send(signal.SIGTERM)
        assert pending_signal() == signal.SIGTERM


def test_what_was_heard_is_forgotten_by_the_next_command() -> None:
    with handle_signals():
        defer_signals()
        send(signal.SIGTERM)
    with handle_signals():
        assert pending_signal() is None
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)


def test_where_nobody_listens_waiting_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    defer_signals()
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_cannot_listen_and_goes_on() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def run() -> None:
        with handle_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_it_is_no_error_that_somebody_mends() -> None:
    assert not issubclass(Interrupted, Exception)
    assert not issubclass(Interrupted, KeyboardInterrupt)
    assert str(Interrupted(15, "saved step 3")) == "ended by SIGTERM, saved step 3"


def forked(life_seconds: int, *, reads_data: bool) -> int:
    """Fork a process that gets both signals, and give the status that it ends with."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            if reads_data:
                interruption._LIFE_AFTER_SECONDS = life_seconds
                survive_signals(0)
            os.write(told, b"x")
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                time.sleep(0.05)
        finally:
            os._exit(7)
    os.read(ready, 1)
    os.kill(child, signal.SIGINT)
    os.kill(child, signal.SIGTERM)
    os.close(ready)
    os.close(told)
    return os.waitpid(child, 0)[1]


def test_a_process_that_reads_data_outlives_a_signal_to_all() -> None:
    with handle_signals():
        defer_signals()
        assert os.waitstatus_to_exitcode(forked(60, reads_data=True)) == 7
        assert pending_signal() is None  # it was not for this one


def test_a_process_that_reads_data_does_not_outlive_it_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)  # it never ends by itself
    assert os.waitstatus_to_exitcode(forked(1, reads_data=True)) == -signal.SIGALRM


def test_any_other_fork_is_ended_by_it() -> None:
    with handle_signals():
        defer_signals()
        assert os.waitstatus_to_exitcode(forked(60, reads_data=False)) == -signal.SIGTERM

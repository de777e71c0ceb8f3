"""SIGINT and SIGTERM as an orderly end: at once, or where training waits for it, after its step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from foam_lightning.distributed.topology import is_first_process

# A process that reads data may get the signal that all of a job get; its parent needs it for the
# rest of a step, and ends it then.
_LIFE_AFTER_SECONDS = 60


class Interrupted(BaseException):
    """A signal asked the command to end. No `Exception`: nothing that mends errors takes it.

    Args:
        number: Of the signal.
        kept: What was saved because of it, for a person; empty where nothing was.

    Attributes:
        exit_code: What a shell gives for a process ended by this signal, 130 or 143.
    """

    def __init__(self, number: int, kept: str = "") -> None:
        self.number = number
        self.exit_code = 128 + number
        said = f"ended by {signal.Signals(number).name}"
        super().__init__(f"{said}, {kept}" if kept else said)


class _SignalState:
    """What this process has heard; of one that it forks the handler knows by the number."""

    process: int | None = None
    pending: int | None = None
    is_waited_for = False


_state = _SignalState()


@contextmanager
def handle_signals() -> Iterator[None]:
    """Let the two signals raise `Interrupted` in this context, in place of what they did before.

    Only the main thread of a process can listen; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _state.process, _state.pending, _state.is_waited_for = os.getpid(), None, False
    try:
        _listen()
        yield
    finally:
        _state.process = None
        for number, handler in before.items():
            signal.signal(number, handler)


def defer_signals() -> None:
    """From now on let a first signal be heard only: whoever calls this asks `pending_signal` often.

    Lightning's own handlers, which it has set by then, would end the run in the middle of a step
    without a word, so they give way.
    """
    if _state.process is not None:
        _listen()
        _state.is_waited_for = True


def stop_deferring_signals() -> None:
    """Let the next signal end the command at once again."""
    _state.is_waited_for = False


def pending_signal() -> int | None:
    """Give the number of the signal that came, None if there was none."""
    return _state.pending


def survive_signals(_: int) -> None:
    """Let this process, which reads data for the one that trains, end when that one says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _outlive_once)


def _listen() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _hear)


def _hear(number: int, _: FrameType | None) -> None:
    if os.getpid() != _state.process:  # a fork, which is not the one to say anything
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    is_first, _state.pending = _state.pending is None, number
    if not _state.is_waited_for or not is_first:
        raise Interrupted(number)
    if is_first_process():
        name = signal.Signals(number).name
        # Not `print`, which a signal may have interrupted.
        os.write(2, f"\n{name}: saving after this step; once more ends at once\n".encode())


def _outlive_once(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    signal.alarm(_LIFE_AFTER_SECONDS)

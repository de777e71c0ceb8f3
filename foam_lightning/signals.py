"""SIGINT and SIGTERM end a command in order: at once, or in training after the current step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from foam_lightning.distributed.topology import is_first_process

# A signal to all processes of a job reaches data workers, too. The training process still needs
# them for the rest of its step, and then stops them; without it they end after this time.
_WORKER_GRACE_SECONDS = 60
_SAVING = "Saving a checkpoint after this step; press Ctrl-C again to quit now"


class Interrupted(BaseException):
    """A signal ended the command. It is no `Exception`, so that no handler of errors catches it.

    Args:
        number: The number of the signal.
        saved: What was saved because of it, such as "saved step 8"; empty if nothing was.

    Attributes:
        exit_code: 128 + the number, as shells report it: 130 or 143.
    """

    def __init__(self, number: int, saved: str = "") -> None:
        self.number = number
        self.exit_code = 128 + number
        text = f"ended by {signal.Signals(number).name}"
        super().__init__(f"{text}, {saved}" if saved else text)


class _SignalState:
    """The signal that this process has received, if any.

    Attributes:
        process: The number of the process that handles signals; a fork inherits the handler.
        pending: The number of the signal.
        is_deferred: The first signal is recorded and ends nothing by itself.
    """

    process: int | None = None
    pending: int | None = None
    is_deferred = False


_state = _SignalState()


@contextmanager
def handle_signals() -> Iterator[None]:
    """Make SIGINT and SIGTERM raise `Interrupted` in this context.

    Only the main thread of a process can handle signals; in another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _state.process, _state.pending, _state.is_deferred = os.getpid(), None, False
    try:
        _set_handlers()
        yield
    finally:
        _state.process = None
        for number, handler in before.items():
            signal.signal(number, handler)


def defer_signals() -> None:
    """Only record a first signal from now on; the caller polls `pending_signal`.

    This replaces Lightning's own handlers, which would end the run in the middle of a step.
    """
    if _state.process is not None:
        _set_handlers()
        _state.is_deferred = True


def stop_deferring_signals() -> None:
    """Let the next signal end the command at once."""
    _state.is_deferred = False


def pending_signal() -> int | None:
    """Return the number of the signal that was received; None if there was none."""
    return _state.pending


def survive_signals(_: int) -> None:
    """Let a data worker outlive signals, until the training process stops it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _set_handlers() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handle)


def _handle(number: int, _: FrameType | None) -> None:
    if os.getpid() != _state.process:  # a fork, which prints nothing
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    is_first, _state.pending = _state.pending is None, number
    if not _state.is_deferred or not is_first:
        raise Interrupted(number)
    if is_first_process():
        name = signal.Signals(number).name
        with suppress(OSError):  # nobody may read it any more
            # Not `print`, which the signal may have interrupted.
            os.write(2, f"\n{name}: {_SAVING}\n".encode())


def _end_later(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    signal.alarm(_WORKER_GRACE_SECONDS)

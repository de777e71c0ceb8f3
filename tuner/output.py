"""Standard output and standard error of a command, which may end before the command does."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO, cast

# Their result is in files, so they go on when nobody reads what they print: `fit ... | head`.
_WRITE_FILES = {"fit", "tune", "compare", "export"}


class PipedStream:
    """A text stream whose reader may go away; what is written after that is dropped.

    Args:
        stream: The stream; everything but writing is its own.
        on_close: Called once, when the reader has gone.
    """

    def __init__(self, stream: TextIO, on_close: Callable[[], None]) -> None:
        self._stream = stream
        self._on_close = on_close

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or drop it if nobody reads it."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._close()
            return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it if nobody reads it."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._close()

    def _close(self) -> None:
        # What is still buffered goes there too, when the interpreter ends.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        self._on_close()


def survive_closed_output(command: str) -> None:
    """Keep a closed standard output or standard error from ending a command with an error.

    A command that writes files goes on and says so; any other ends as SIGPIPE would end it.

    Args:
        command: The name of the command.
    """

    def on_closed_output() -> None:
        if command not in _WRITE_FILES:
            raise SystemExit(128 + signal.SIGPIPE)
        sys.stderr.write(f"standard output is closed; {command} goes on without it\n")

    sys.stdout = _survivor(sys.stdout, on_closed_output)
    sys.stderr = _survivor(sys.stderr, lambda: None)


def _survivor(stream: TextIO | None, on_close: Callable[[], None]) -> TextIO:
    if stream is None:  # it was closed before the command began
        return Path(os.devnull).open("w", encoding="utf-8")
    return cast(TextIO, PipedStream(stream, on_close))

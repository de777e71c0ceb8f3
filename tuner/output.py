"""Standard output and standard error of a command, which may end before the command does."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO, cast

# Their result is in files, so they go on when nobody reads what they print: `fit ... | head`.
_WRITE_FILES = {"fit", "tune", "compare", "export"}


class DroppingStream:
    """A text stream that drops what it cannot write any more: to a pipe, terminal or full disk.

    Args:
        stream: The stream; everything but writing is its own.
        on_close: Called with the first error.
    """

    def __init__(self, stream: TextIO, on_close: Callable[[OSError], None]) -> None:
        self._stream = stream
        self._on_close = on_close

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._close(error)
            return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._close(error)

    def _close(self, error: OSError) -> None:
        # What is still buffered goes there too, when the interpreter ends.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        self._on_close(error)


def survive_closed_output(command: str) -> None:
    """Keep an output that cannot be written from ending a command that writes files.

    Any other command ends: as SIGPIPE would end it if nobody reads what it prints, otherwise with
    the error.

    Args:
        command: The name of the command.
    """

    def on_closed_output(error: OSError) -> None:
        is_pipe = isinstance(error, BrokenPipeError)
        if command in _WRITE_FILES:
            what = "is closed" if is_pipe else f"cannot be written: {error.strerror}"
            sys.stderr.write(f"standard output {what}; {command} goes on without it\n")
        elif is_pipe:
            raise SystemExit(128 + signal.SIGPIPE)
        else:
            error.filename = "standard output"
            raise error

    sys.stdout = _survivor(sys.stdout, on_closed_output)
    sys.stderr = _survivor(sys.stderr, lambda _: None)


def _survivor(stream: TextIO | None, on_close: Callable[[OSError], None]) -> TextIO:
    if stream is None:  # it was closed before the command began
        return Path(os.devnull).open("w", encoding="utf-8")
    return cast(TextIO, DroppingStream(stream, on_close))

"""Call a function in a new process, which may fail, die or hang."""

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def in_fresh_process(
    context: Any, seconds: float, function: Callable[..., object], *arguments: object
) -> tuple[Any, str | None]:
    """Call a function in a new process.

    Args:
        context: A context of multiprocessing.
        seconds: Time limit; then the process is killed.
        function: The function; it and its result must pickle.
        arguments: Its arguments.

    Returns:
        Its result and None, or None and the reason why there is no result.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return None, f"not done after {seconds:.0f} s"
        found: tuple[Any, str | None] = receiver.recv()
        return found
    except EOFError:
        return None, "the process died"
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, function: Callable[..., object], arguments: Any) -> None:
    try:
        sender.send((function(*arguments), None))
    except Exception as error:  # whatever it is, it is this call's, and others go on
        sender.send((None, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"))

"""What the commands print for people: wrapped between words, never inside a path or a command."""

import textwrap

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def say(text: str, *, wrap: bool = True, console: Console | None = None) -> None:
    """Print text, wrapped at the width of a terminal; a pipe or a file gets the lines as they are.

    Args:
        text: One or more lines; a wrapped line is indented by two more spaces than its start.
        wrap: False where lines are commands, to be copied whole.
        console: The console of a progress bar that is on the screen.
    """
    console = console or Console()
    if wrap and console.is_terminal:
        text = "\n".join(_wrap(line, console.width) for line in text.splitlines())
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def step_progress(description: str, total: int) -> Progress:
    """Make a bar of optimizer steps with one task, which only a terminal shows while it lasts.

    Args:
        description: What the steps are for, in a word.
        total: How many there are.
    """
    console = Console()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal or console.is_dumb_terminal,
    )
    progress.add_task(description, total=total)
    return progress


def _wrap(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line,
        width,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )

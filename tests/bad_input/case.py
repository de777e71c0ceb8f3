"""A command that must be refused, as data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Content = str | bytes
Prepare = Callable[[Path, Path], object]


def nothing(_at: Path, _good: Path) -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Case:
    """A command that must be refused.

    Attributes:
        name: Name of the case.
        words: The command line, separated by blanks.
        says: Text that the error must contain.
        code: The exit code.
        more: Further words, which may contain blanks.
        files: Contents of files to write, by name.
        prepare: Prepares anything else, from the folder of the case and the folder of valid files.
        has_begun: Whether the command prints what it does before the error.
    """

    name: str
    words: str
    says: str
    code: int = 2
    more: tuple[str, ...] = ()
    files: Mapping[str, Content] = field(default_factory=dict)
    prepare: Prepare = nothing
    has_begun: bool = False


def fit(name: str, words: str, says: str, **rest: Any) -> Case:
    return Case(name, f"fit --config {{good}}/tiny.yaml {words}", says, **rest)


def reading(name: str, words: str, says: str, **rest: Any) -> Case:
    """Read the data as `fit` does, without an account of memory before it."""
    words = f"compare --config {{good}}/tiny.yaml --optimizers adamw {words}"
    return Case(name, words, says, **rest)


def plan(name: str, words: str, says: str, **rest: Any) -> Case:
    return Case(name, f"plan --config {{good}}/tiny.yaml --uniform-level 1 {words}", says, **rest)

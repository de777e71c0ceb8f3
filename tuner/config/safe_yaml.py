"""YAML as text: looked at event by event before anything is built of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Far above what any configuration needs, and far below where a parser takes minutes or crashes:
# libyaml is quadratic in depth, and at 200 000 brackets building them overflows its stack.
_MOST_CHARACTERS = 2**20
_MOST_DEPTH = 32
_MOST_NODES = 20_000


class UnsafeYamlError(yaml.YAMLError):
    """The text would be built into something too deep, too large or ambiguous."""


def load_yaml(text: str) -> Any:
    """Build plain values from YAML: mappings, lists, texts, numbers; never another object.

    Args:
        text: One document of at most a megabyte.

    Raises:
        yaml.YAMLError: It is not YAML, names a Python object, says a key twice, contains itself,
            or is larger or deeper than any configuration, aliases written out.
    """
    check_yaml(text)
    with _as_yaml_error():
        return yaml.load(text, Loader=_Loader)


def check_yaml(text: str) -> None:
    """Refuse text that must not be built.

    Raises:
        yaml.YAMLError: It is not YAML, says a key twice, contains itself, or is too large or deep.
    """
    if len(text) > _MOST_CHARACTERS:
        raise UnsafeYamlError(f"it has {len(text)} characters; {_MOST_CHARACTERS} at most")
    walk = _Walk()
    with _as_yaml_error():
        for event in yaml.parse(text, Loader=_Loader):
            walk.take(event)


def checked_loader(loader: Any) -> type:
    """Make of a safe loader of PyYAML one that looks before it builds."""

    class Careful(loader):  # type: ignore[misc]
        def __init__(self, stream: str) -> None:
            check_yaml(stream)
            super().__init__(stream)

        def get_single_data(self) -> Any:
            with _as_yaml_error():
                return super().get_single_data()

    return Careful


@contextmanager
def _as_yaml_error() -> Iterator[None]:
    """Turn Python's own errors, which PyYAML lets through, into the one that callers expect.

    They come of an integer of 5000 digits, a date in the 99th month, half a surrogate pair.
    """
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        raise yaml.YAMLError(str(error)) from error


@dataclass
class _Open:
    """A mapping or a list that has not ended: its values so far, aliases written out."""

    anchor: str | None
    keys: set[str] | None  # None in a list
    awaits_key: bool = True
    size: int = 1


@dataclass
class _Walk:
    """Where in the text the events have come to."""

    open: list[_Open] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    def take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            is_mapping = isinstance(event, yaml.MappingStartEvent)
            self.open.append(_Open(event.anchor, set() if is_mapping else None))
            if len(self.open) > _MOST_DEPTH:
                raise UnsafeYamlError(f"it is nested more than {_MOST_DEPTH} deep")
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            ended = self.open.pop()
            self._add(ended.size, ended.anchor)
        elif isinstance(event, yaml.ScalarEvent):
            self._add(1, event.anchor, event.value)
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == one.anchor for one in self.open):
                raise UnsafeYamlError(f"*{event.anchor} contains itself")
            self._add(self.sizes.get(str(event.anchor), 1), None)

    def _add(self, size: int, anchor: str | None, text: str | None = None) -> None:
        if anchor is not None:
            self.sizes[anchor] = size
        if not self.open:
            return
        around = self.open[-1]
        around.size += size
        if around.size > _MOST_NODES:
            raise UnsafeYamlError(f"it has more than {_MOST_NODES} values, aliases written out")
        if around.keys is not None:
            if around.awaits_key and text is not None:
                if text in around.keys:
                    raise UnsafeYamlError(f"it says {text!r} twice in one place")
                around.keys.add(text)
            around.awaits_key = not around.awaits_key

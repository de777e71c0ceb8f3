"""YAML that is safe to load: its parser events are checked before any object is built."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Far above what any configuration needs, and far below where a parser takes minutes or crashes:
# libyaml takes quadratic time in depth, and overflows its stack at 200 000 nested brackets.
_MAX_CHARACTERS = 2**20
_MAX_DEPTH = 32
_MAX_NODES = 20_000


class UnsafeYamlError(yaml.YAMLError):
    """The content would be too deep, too large or ambiguous."""


def load_yaml(text: str) -> Any:
    """Load YAML as mappings, lists, text and numbers; never as other objects.

    Args:
        text: One document of at most 2**20 characters.

    Raises:
        yaml.YAMLError: As for `check_yaml`, or the text names a Python object.
    """
    check_yaml(text)
    with _as_yaml_error():
        return yaml.load(text, Loader=_Loader)


def check_yaml(text: str) -> None:
    """Refuse text that is not safe to load.

    Raises:
        yaml.YAMLError: It is not YAML, has a duplicate key, contains itself, or is too large or
            too deep with its aliases expanded.
    """
    if len(text) > _MAX_CHARACTERS:
        raise UnsafeYamlError(
            f"it has {len(text)} characters, at most {_MAX_CHARACTERS} are allowed"
        )
    check = _EventCheck()
    with _as_yaml_error():
        for event in yaml.parse(text, Loader=_Loader):
            check.add(event)


def checked_loader(loader: Any) -> type:
    """Return a subclass of a safe PyYAML loader that checks the text first."""

    class CheckedLoader(loader):  # type: ignore[misc]
        def __init__(self, stream: str) -> None:
            check_yaml(stream)
            super().__init__(stream)

        def get_single_data(self) -> Any:
            with _as_yaml_error():
                return super().get_single_data()

    return CheckedLoader


@contextmanager
def _as_yaml_error() -> Iterator[None]:
    """Raise YAMLError for Python's own errors, which PyYAML lets through.

    Examples are an integer of 5000 digits, a date in month 99, and half a surrogate pair.
    """
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        raise yaml.YAMLError(str(error)) from error


@dataclass
class _Collection:
    """A mapping or a list that has not ended yet."""

    anchor: str | None
    keys: set[str] | None  # None for a list
    is_key_next: bool = True
    size: int = 1  # values so far, with aliases expanded


@dataclass
class _EventCheck:
    """Checks the events of a document one by one."""

    open: list[_Collection] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)  # by anchor

    def add(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            is_mapping = isinstance(event, yaml.MappingStartEvent)
            self.open.append(_Collection(event.anchor, set() if is_mapping else None))
            if len(self.open) > _MAX_DEPTH:
                raise UnsafeYamlError(f"it is nested more than {_MAX_DEPTH} deep")
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            ended = self.open.pop()
            self._add_value(ended.size, ended.anchor)
        elif isinstance(event, yaml.ScalarEvent):
            self._add_value(1, event.anchor, event.value)
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == one.anchor for one in self.open):
                raise UnsafeYamlError(f"*{event.anchor} contains itself")
            self._add_value(self.sizes.get(str(event.anchor), 1), None)

    def _add_value(self, size: int, anchor: str | None, text: str | None = None) -> None:
        if anchor is not None:
            self.sizes[anchor] = size
        if not self.open:
            return
        parent = self.open[-1]
        parent.size += size
        if parent.size > _MAX_NODES:
            raise UnsafeYamlError(f"it has more than {_MAX_NODES} values, counting aliases")
        if parent.keys is not None:
            if parent.is_key_next and text is not None:
                if text in parent.keys:
                    raise UnsafeYamlError(f"the key {text!r} appears twice in one mapping")
                parent.keys.add(text)
            parent.is_key_next = not parent.is_key_next

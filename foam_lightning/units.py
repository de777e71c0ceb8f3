"""Byte sizes as people write them. GB = 10**9 and GiB = 2**30, always."""

import re
from typing import Self

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_MOST = 2**63 - 1  # what an address of 64 bits can reach
_NAMES = ("TiB", "TB", "GiB", "GB", "MiB", "MB", "KiB", "kB")
# Python reads no longer numbers, and no memory has so many bytes.
_PATTERN = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]{1,3})\s*")


class ByteSize(int):
    """A positive number of bytes, written as "24GB" (24 * 10**9) or "24GiB" (24 * 2**30).

    `str` gives the shortest such text that reads back as the same number.

    Args:
        value: A text with a number and a unit, or a number of bytes as an int.

    Raises:
        ValueError: The text has no number, no unit or an unknown one, or the size is not
            positive or above any memory.
    """

    def __new__(cls, value: str | int) -> Self:
        """Read a text, or take a number of bytes."""
        size = super().__new__(cls, _parse(value) if isinstance(value, str) else value)
        if not 0 < size <= _MOST:
            raise ValueError(
                f"a memory size must be above zero and at most {_MOST} bytes, got "
                f"{' '.join(str(value).split())}; write for example 24GB"
            )
        return size

    def __str__(self) -> str:
        for name in _NAMES:
            if int(self) % _UNITS[name.upper()] == 0:
                return f"{int(self) // _UNITS[name.upper()]}{name}"
        return f"{int(self)}B"

    def __repr__(self) -> str:
        return f"ByteSize({str(self)!r})"


def _parse(text: str) -> int:
    match = _PATTERN.fullmatch(text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(
            f"{text[:40]!r} is not a memory size; write a number and a unit, for example 24GB or "
            "22.5GiB"
        )
    whole, _, fraction = match[1].partition(".")
    # Integers all the way: a float would lose bytes above 2**53.
    digits: int = 10 ** len(fraction)
    return int(whole + fraction) * _UNITS[match[2].upper()] // digits


def format_bytes(num_bytes: int) -> str:
    """Render bytes for people, four significant digits at most: 21002000000 -> "21 GB"."""
    return _rendered(num_bytes, _unit_of(num_bytes), 4)


def format_bytes_apart(*counts: int) -> list[str]:
    """Render byte counts that are compared: 9000000 and 9000123 -> "9 MB" and "9.0001 MB".

    Args:
        counts: At least one, none below 0.

    Returns:
        One text a count, in one unit where they are within a factor of 1000, with four significant
        digits, or with as many more as it takes for different counts to have different texts.
    """
    largest = max(counts)
    units = [_unit_of(largest if 1000 * count > largest else count) for count in counts]
    for digits in range(4, 20):
        texts = [_rendered(*pair, digits) for pair in zip(counts, units, strict=True)]
        if len(set(texts)) == len(set(counts)):
            break
    return texts


def _unit_of(num_bytes: int) -> str:
    names = ("TB", "GB", "MB", "kB")
    return next((name for name in names if abs(num_bytes) >= _UNITS[name.upper()]), "B")


def _rendered(num_bytes: int, unit: str, digits: int) -> str:
    return f"{num_bytes / _UNITS[unit.upper()]:.{digits}g} {unit}"


def at_least(num_bytes: int) -> str:
    """Round up to four digits, as a size that can be typed: 30199173435 -> "30.2GB"."""
    step = 10 ** max(0, len(str(num_bytes)) - 4)
    rounded = -(-num_bytes // step) * step
    return format_bytes(rounded).replace(" ", "")

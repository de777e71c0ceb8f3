"""Passwords and tokens among the settings are refused, because settings are written to files."""

import re
from collections.abc import Iterator
from typing import Any

from foam_lightning.errors import ConfigError

# user:password@ in a URL, and tokens of the Hugging Face Hub.
_SECRETS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s@]+:[^/\s@]+@|\bhf_[A-Za-z0-9]{20,}")


def refuse_credentials(place: str, settings: Any) -> None:
    """Refuse a password or a token anywhere in settings.

    Args:
        place: Where the settings come from.
        settings: Text, or nested mappings and lists of text.

    Raises:
        ConfigError: There is one; the message does not contain it.
    """
    if any(_SECRETS.search(text) for text in _texts(settings)):
        raise ConfigError(
            f"{place} contains a password or a token, which would be written to config.yaml; "
            "remove it, and put it into HF_TOKEN or ~/.netrc"
        )


def _texts(settings: Any) -> Iterator[str]:
    if isinstance(settings, str):
        yield settings
    elif isinstance(settings, dict):
        for key, value in settings.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(settings, list | tuple | set):
        for value in settings:
            yield from _texts(value)

"""Passwords and tokens among the settings: refused, because settings are written to files."""

import re
from collections.abc import Iterator
from typing import Any

from foam_lightning.errors import ConfigError

# user:password@ in a URL; and the tokens of the Hugging Face Hub.
_SECRETS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s@]+:[^/\s@]+@|\bhf_[A-Za-z0-9]{20,}")


def refuse_credentials(place: str, settings: Any) -> None:
    """Refuse a password or a token anywhere in settings, without showing it.

    Args:
        place: Where the settings come from, for the error.
        settings: A text, or mappings and lists with texts.

    Raises:
        ConfigError: There is one.
    """
    if any(_SECRETS.search(text) for text in _texts(settings)):
        raise ConfigError(
            f"{place} holds a password or a token, which would be written to config.yaml; leave it "
            "out, and put it into HF_TOKEN or ~/.netrc"
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

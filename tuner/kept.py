"""Runs that a folder keeps, so that the same command goes on from them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foam_lightning.errors import ConfigError
from foam_lightning.run_folder import write_json
from tuner.objective import ShortRun


class KeptRuns:
    """Short runs by key in one JSON file, which is whole at every moment.

    Args:
        path: The file; it need not exist.

    Raises:
        ConfigError: It holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Any] = {}
        if path.exists():
            try:
                self._entries = json.loads(path.read_text(encoding="utf-8"))
                self._runs = {key: _run_of(entry) for key, entry in self._entries.items()}
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise ConfigError(
                    f"{path} does not hold runs ({type(error).__name__}); move it away"
                ) from error
        else:
            self._runs = {}

    def get(self, key: str) -> ShortRun | None:
        """Give the run of a key; None where it was not done."""
        return self._runs.get(key)

    def put(self, key: str, about: Mapping[str, Any], run: ShortRun) -> None:
        """Keep a run.

        Args:
            key: What tells it from all others.
            about: The same for a reader.
            run: What came of it; its training curve is not kept.
        """
        self._runs[key] = run
        self._entries[key] = {
            **about,
            "loss": run.loss,
            "nats": list(run.nats),
            "num_tokens": list(run.num_tokens),
        }
        write_json(self._path, self._entries)


def _run_of(entry: Mapping[str, Any]) -> ShortRun:
    return ShortRun(entry["nats"], entry["num_tokens"])

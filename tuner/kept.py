"""What a folder keeps of runs, so that the same command goes on from them."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from foam_lightning.errors import ConfigError
from foam_lightning.run_folder import write_json
from tuner.objective import ShortRun


class Kept:
    """What was measured, by key, in one JSON file, which is whole at every moment.

    Args:
        path: The file; it need not exist. None keeps nothing beyond this object.

    Raises:
        ConfigError: It holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[str, Any] = {}
        if path is not None and path.exists():
            try:
                self._entries = dict(json.loads(path.read_text(encoding="utf-8")).items())
            except (OSError, ValueError, AttributeError) as error:
                raise _not_runs(path, error) from error

    def get(self, key: str) -> Any:
        """Give what was measured under a key; None where nothing was."""
        return self._entries.get(key)

    def put(self, key: str, entry: Any) -> None:
        """Keep what was measured, as JSON values."""
        self._entries[key] = entry
        if self._path is not None:
            write_json(self._path, self._entries)

    def items(self) -> Iterable[tuple[str, Any]]:
        """Give all of it, by key."""
        return self._entries.items()

    def of(self, key: str, measure: Callable[[], Any]) -> Any:
        """Give what was measured under a key, before or now."""
        if key not in self._entries:
            self.put(key, measure())
        return self._entries[key]


class KeptRuns:
    """Short runs by key, kept in the same way.

    Args:
        path: As of `Kept`.

    Raises:
        ConfigError: The file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._kept = Kept(path)
        try:
            self._runs = {key: _run_of(entry) for key, entry in self._kept.items()}
        except (TypeError, KeyError) as error:
            assert path is not None
            raise _not_runs(path, error) from error

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
        lists = {"nats": list(run.nats), "num_tokens": list(run.num_tokens)}
        self._kept.put(key, {**about, "loss": run.loss, **lists})


def _run_of(entry: Mapping[str, Any]) -> ShortRun:
    return ShortRun(entry["nats"], entry["num_tokens"])


def _not_runs(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} does not hold runs ({type(error).__name__}); move it away")

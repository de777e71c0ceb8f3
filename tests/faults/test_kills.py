"""Random kills across tune, fit and export: the benchmark of fifty, in short."""

from pathlib import Path

import pytest

from tests.benchmarks.kills import Kills, page
from tests.faults.killing import Place


@pytest.mark.slow
def test_whatever_is_killed_goes_on_to_the_same_end(tmp_path: Path) -> None:
    kills = Kills(Place(tmp_path))
    kills.measure({"tune": 2, "fit": 0, "train": 2, "export": 1}, seed=3)
    assert kills.differences == []
    assert kills.resumed == {"tune": 2, "fit": 0, "train": 2, "export": 1}
    assert kills.trials_lost == 0
    assert 0 < max(kills.steps_lost) + kills.undisturbed.interval <= 2 * kills.undisturbed.interval
    assert "the same, bit for bit" in page(kills, 3)[-1]

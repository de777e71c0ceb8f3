"""Random kills across tune, fit and export: the benchmark of fifty, in short."""

from pathlib import Path

import pytest

from tests.benchmarks.kills import Kills, page
from tests.faults.killing import Place


@pytest.mark.slow
def test_whatever_is_killed_goes_on_to_the_same_end(tmp_path: Path) -> None:
    kills = Kills(Place(tmp_path, trials=4, steps=4))
    kills.measure({"tune": 1, "fit": 0, "train": 1, "export": 1}, seed=3)
    assert kills.differences == []
    assert kills.resumed == {"tune": 1, "fit": 0, "train": 1, "export": 1}
    assert kills.trials_lost == 0
    assert min(kills.steps_lost) >= 0
    # All of them, where the kill came between a step and its checkpoint.
    assert max(kills.steps_lost) <= kills.undisturbed.interval
    assert "the same, bit for bit" in page(kills, 3)[-1]

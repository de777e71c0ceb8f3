"""The study file is Optuna's own: the dashboard shows it, whatever it keeps beside it."""

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna_dashboard import wsgi
from werkzeug.test import Client

from tuner.trials.runner import TrialResult
from tuner.trials.study import Study


def evaluated(trial: optuna.Trial) -> TrialResult:
    """Diverge at every other trial."""
    scale = trial.suggest_float("scale_factor", 0.4, 2.5, log=True)
    loss = math.nan if trial.number % 2 else 3 + math.log(scale) ** 2
    return TrialResult([loss * 8] * 3, [8] * 3, [4.0, loss])


@pytest.fixture
def ask(tmp_path: Path) -> Any:
    study = Study(tmp_path / "study.db", "folded", seed=0)
    study.search([{"scale_factor": 1.0}], num_trials=4, evaluate=evaluated)
    Study(tmp_path / "study.db", "final", seed=0).do(["a plan"], lambda _: TrialResult([24.0], [8]))
    client = Client(wsgi(f"sqlite:///{tmp_path / 'study.db'}"))

    def answer(path: str) -> Any:
        response = client.get(path)
        assert response.status_code == 200
        return json.loads(response.text)

    return answer


def test_it_lists_every_stage(ask: Any) -> None:
    studies = ask("/api/studies")["study_summaries"]
    assert [study["study_name"] for study in studies] == ["folded", "final"]


def test_it_shows_trials_with_their_parameters_and_losses(ask: Any) -> None:
    (folded, _) = ask("/api/studies")["study_summaries"]
    detail = ask(f"/api/studies/{folded['study_id']}")
    trials = detail["trials"]
    assert [trial["state"] for trial in trials] == ["Complete", "Pruned", "Complete", "Pruned"]
    first = trials[0]
    assert first["values"] == [3.0]
    assert [(p["name"], float(p["param_external_value"])) for p in first["params"]] == [
        ("scale_factor", 1.0)
    ]
    kept = {attr["key"]: attr["value"] for attr in first["user_attrs"]}
    assert json.loads(kept["nats"]) == [24.0] * 3
    assert [p["name"] for p in detail["union_search_space"]] == ["scale_factor"]


def test_it_shows_the_finals(ask: Any) -> None:
    (_, final) = ask("/api/studies")["study_summaries"]
    (trial,) = ask(f"/api/studies/{final['study_id']}")["trials"]
    assert trial["values"] == [3.0]

"""The study file is Optuna's own: the dashboard shows it, with all that is stored in it."""

import json
import math
from pathlib import Path
from typing import Any

import optuna
from optuna_dashboard import wsgi
from werkzeug.test import Client

from tuner.trials.runner import TrialResult
from tuner.trials.study import Study


def diverge_at_every_other_trial(trial: optuna.Trial) -> TrialResult:
    scale = trial.suggest_float("scale_factor", 0.4, 2.5, log=True)
    loss = math.nan if trial.number % 2 else 3 + math.log(scale) ** 2
    return TrialResult([loss * 8] * 3, [8] * 3, [4.0, loss])


def test_it_shows_every_stage_with_parameters_losses_and_finals(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    study = Study(path, "folded", seed=0)
    study.search([{"scale_factor": 1.0}], num_trials=4, evaluate=diverge_at_every_other_trial)
    Study(path, "final", seed=0).run_named(["a plan"], lambda _: TrialResult([24.0], [8]))
    client = Client(wsgi(f"sqlite:///{path}"))

    def get(url: str) -> Any:
        response = client.get(url)
        assert response.status_code == 200
        return json.loads(response.text)

    studies = get("/api/studies")["study_summaries"]
    assert [study["study_name"] for study in studies] == ["folded", "final"]
    folded, final = (get(f"/api/studies/{study['study_id']}") for study in studies)

    assert [trial["state"] for trial in folded["trials"]] == ["Complete", "Pruned"] * 2
    first = folded["trials"][0]
    assert first["values"] == [3.0]
    assert [param["name"] for param in first["params"]] == ["scale_factor"]
    assert [trial["values"] for trial in final["trials"]] == [[3.0]]

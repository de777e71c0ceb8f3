import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from lightning.pytorch.plugins import MixedPrecision

from foam_lightning.job import Job
from foam_lightning.memory.allocator import set_expandable_segments
from foam_lightning.settings import DataSettings, ModelSettings, TrainerSettings
from foam_lightning.training import train
from tests.support.runs import Finished, open_folder, small
from tuner.planning.planner import BudgetPlanner

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("ci")
# With small tensors and other processes at work, several threads are slower than one.
torch.set_num_threads(1)
set_expandable_segments()  # as the command line does

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden/ with what is found now"
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The data settings of a small text that a model learns fast, and a cache to share."""
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text.txt"
    text.write_text("".join(f"{i} and {i * i % 97} make {i * 3}.\n" for i in range(1000)))
    return {"files": [str(text)], "cache_dir": str(folder / "cache")}


@pytest.fixture(scope="session")
def new_job(corpus: dict[str, Any]) -> Callable[..., Job]:
    """Return `new_job(model={...}, data={...}, trainer={...})`, which makes a job of seconds."""

    def make(
        *,
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> Job:
        return Job(
            model=ModelSettings(
                **{
                    "hidden_size": 32,
                    "intermediate_size": 44,  # ragged from level 3 on
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "vocab_size": 300,
                    "state_dtype": "float32",
                    **(model or {}),
                }
            ),
            data=DataSettings(
                **{
                    **corpus,
                    "vocab_size": 300,
                    "sequence_length": 16,
                    "batch_size": 8,
                    "micro_batch_size": None,
                    "validation_sequences": 20,
                    **(data or {}),
                }
            ),
            trainer=TrainerSettings(
                {
                    "accelerator": "cpu",
                    "max_steps": 8,
                    "log_every_n_steps": 1,
                    "enable_progress_bar": False,
                    **(trainer or {}),
                }
            ),
            seed=seed,
        )

    return make


@pytest.fixture
def float16_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Lightning train under 16-mixed, with a gradient scaler, on a CPU, as it does on a GPU.

    Jobs for it have the accelerator "auto".
    """
    connector = "lightning.pytorch.trainer.connectors.accelerator_connector._AcceleratorConnector"
    monkeypatch.setattr(
        f"{connector}._check_and_init_precision", lambda _: MixedPrecision("16-mixed", "cpu")
    )


@pytest.fixture
def job(new_job: Callable[..., Job]) -> Job:
    return new_job()


@pytest.fixture(scope="session")
def fit(new_job: Callable[..., Job]) -> Callable[[int], BudgetPlanner]:
    """Return `fit(budget_bytes)`: a planner for a job whose largest memory term is its state."""
    job = new_job(
        model={"hidden_size": 96, "intermediate_size": 172, "num_hidden_layers": 4},
        data={"batch_size": 4},
        trainer={"accelerator": "auto"},
    )
    return BudgetPlanner(job, 10**12).with_budget  # traces once for all


@pytest.fixture(scope="session")
def finished(new_job: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One full run, whose results many tests look at and none changes."""
    from matplotlib.image import imsave

    job = small(new_job)
    plan = job.uniform_plan(2)
    folder = open_folder(tmp_path_factory.mktemp("finished"))
    picture = folder.path / "picture.png"
    imsave(picture, torch.rand(4, 4, 3).numpy())
    predicted = job.new_accountant().account(plan).peak_bytes
    trained = train(job, plan, folder, predicted_bytes=predicted, pictures={"plan": picture})
    return Finished(job, plan, folder, trained)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return `golden(name, value)`, which compares a value with tests/golden/<name>.json.

    Numbers may differ by `within`, since their last bits depend on the processor.
    """

    def check(name: str, value: Any, within: float = 0.0) -> None:
        path = GOLDEN / f"{name}.json"
        text = json.dumps(value, indent=2) + "\n"
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing; write it with pytest --update-golden"
        # Through JSON, so that tuples equal lists and keys are texts.
        found, expected = json.loads(text), json.loads(path.read_text(encoding="utf-8"))
        if within:
            expected = pytest.approx(expected, abs=within)
        assert found == expected, f"{name} changed; if meant, rerun with --update-golden"

    return check

"""The first comment line of a recipe in configs/ is its command, the second its predicted peak."""

import re
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from foam_lightning.units import format_bytes
from tests.support.pretrained import LLAMA3_8B
from tests.support.tiny import REPOSITORY
from tuner.config.early_checks import default_config
from tuner.config.parser import Settings, parse
from tuner.planning.planner import BudgetPlanner

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))
C4 = REPOSITORY / "configs" / "c4.yaml"
# The models that recipes without sizes of their own are written for.
_PRETRAINED = {
    "finetune": LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),
    "finetune_llama3_8b_24gb": LlamaConfig(**LLAMA3_8B),
}
_EXPECTED = re.compile(
    r"# Predicted peak: (?P<peak>[0-9.]+ [MG]B)(?: for TinyLlama 1\.1B)?"
    r"(?:, with micro-batches of (?P<rows>[0-9]+) rows)?(?:; time: .* \((?P<page>.*)\))?\."
)


def second_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[1]


def recipe_settings(path: Path, pretrained: Path, *more: str) -> Settings:
    """Read the command of a recipe."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# python cli.py fit "), path
    text = first.removeprefix("# python cli.py fit ")
    options = [*text.replace("DIR", str(pretrained)).replace("FILE", "a.txt").split(), *more]
    return parse("plan", options, default=default_config(options))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_first_line_of_a_recipe_is_its_command(path: Path, tmp_path: Path) -> None:
    parsed = recipe_settings(path, tmp_path / "model")
    assert parsed.memory_budget is not None
    assert f"configs/{path.name}" in path.read_text().splitlines()[0] or path.stem == "default"
    job = parsed.job()
    if job.model.pretrained is None:
        assert job.new_module().llama_config().vocab_size == job.data.vocab_size
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= {
        *("name", "model", "data", "trainer", "tune")
    }


def test_other_data_of_as_many_rows_take_as_much() -> None:
    assert second_line(C4) == second_line(C4.with_name("llama_60m.yaml"))


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if path != C4], ids=lambda path: path.stem
)
def test_the_second_line_of_a_recipe_is_the_peak_that_plan_prints(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _EXPECTED.fullmatch(second_line(path))
    assert expected, second_line(path)
    assert expected["page"] is None or (REPOSITORY / expected["page"]).is_file()
    monkeypatch.setattr("foam_lightning.job.find_gpu", lambda **_: None)  # what one here costs
    if path.stem in _PRETRAINED:
        _PRETRAINED[path.stem].save_pretrained(tmp_path)
    # Micro-batches that are larger, and too large, take most of the time; they are left out.
    rows = ["--data.micro_batch_size", expected["rows"]] if expected["rows"] else []
    parsed = recipe_settings(path, tmp_path, *rows)
    planner = BudgetPlanner(parsed.job(), parsed.memory_budget)
    plan = planner.default_plan()
    assert format_bytes(planner.accountant.account(plan).peak_bytes) == expected["peak"]
    if expected["rows"]:
        assert plan.memory_options.micro_batch_size == int(expected["rows"])


@pytest.mark.slow
def test_7b_with_512_rows_a_step_fits_24_gb_with_gradients_in_host_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("foam_lightning.job.find_gpu", lambda **_: None)
    budget = ["--memory-budget", "24GB", "--data.batch_size", "512"]
    config = ["--config", str(REPOSITORY / "configs" / "llama_7b.yaml")]
    # Larger micro-batches do not fit, and take most of the time.
    words = [*config, *budget, "--data.micro_batch_size", "32"]
    parsed = parse("plan", words, default=default_config(words))
    planner = BudgetPlanner(parsed.job(), parsed.memory_budget)
    plan = planner.uniform(2)
    account, options = planner.accountant.account(plan), plan.memory_options
    assert sum(account.breakdown.values()) == account.peak_bytes <= 24_000_000_000
    assert (options.micro_batch_size, options.accumulate_grad_batches) == (32, 16)
    assert (options.grad_offload, options.state_offload) == (True, False)
    assert format_bytes(account.host_bytes) == "17.72 GB"
    assert "431.3 GB" in planner.option_costs(plan)["grad_offload"]

import io
import json
from dataclasses import asdict, fields, replace
from types import MappingProxyType

import pytest
import torch
from rich.console import Console, RenderableType

from foam_lightning.memory.account import Account
from foam_lightning.memory.inventory import TensorGroup
from foam_lightning.memory.timeline import Origin
from foam_lightning.plan import FoldPlan, MemoryOptions
from tests.support.search_results import (
    ACCOUNT,
    BREAKDOWN,
    MIXED,
    PEAK,
    UNIFORM,
    mixed_plan,
    uniform_plan,
)
from tuner.planning.planner import NearbyBudget
from tuner.report.plan_table import (
    TERM_NAMES,
    plan_json,
    plan_table,
    tensor_table,
    tensors_as_json,
)

OPTIONS = UNIFORM.plan.memory_options


def with_options(**changed) -> FoldPlan:
    return replace(UNIFORM.plan, memory_options=replace(OPTIONS, **changed))


def rendered(table: RenderableType, width: int = 80) -> str:
    console = Console(width=width, no_color=True, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def printed(
    plan: FoldPlan = UNIFORM.plan,
    account: Account = ACCOUNT,
    *,
    budget=None,
    minimum=None,
    nearby_budgets=(),
    option_costs=MappingProxyType({}),
    width=80,
) -> str:
    return rendered(plan_table(plan, account, budget, minimum, nearby_budgets, option_costs), width)


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# ---- plan --format json


def test_json_has_the_keys_of_the_contract_in_order() -> None:
    found = json.loads(plan_json(MIXED.plan, ACCOUNT, 32_000_000, 9_000_000))
    keys = "schema feasible budget_bytes predicted_peak_bytes host_bytes minimum_budget_bytes"
    assert list(found) == [*keys.split(), "binding", "breakdown", "memory_options", "levels"]
    assert found["schema"] == "foam-lightning/plan/3"
    assert list(found["breakdown"]) == list(BREAKDOWN)
    assert found["memory_options"] == asdict(MIXED.plan.memory_options)
    options = "micro_batch_size accumulate_grad_batches activation_checkpointing"
    options += " gradient_release chunked_loss state_dtype"
    assert set(options.split()) < set(found["memory_options"])
    assert found["levels"] == MIXED.plan.levels
    assert found["binding"] == "loss"
    assert (found["budget_bytes"], found["minimum_budget_bytes"]) == (32_000_000, 9_000_000)


@pytest.mark.parametrize(
    ("budget", "feasible"), [(None, True), (PEAK, True), (PEAK - 1, False)], ids=str
)
def test_json_says_whether_the_plan_fits(budget: int | None, feasible: bool) -> None:
    found = json.loads(plan_json(UNIFORM.plan, ACCOUNT, budget, None))
    assert found["feasible"] is feasible
    assert found["budget_bytes"] == budget
    assert found["minimum_budget_bytes"] is None
    assert sum(found["breakdown"].values()) == found["predicted_peak_bytes"] == PEAK


# ---- plan --format table


@pytest.mark.parametrize("plan", [uniform_plan(2), mixed_plan(80)], ids=["uniform", "mixed"])
@pytest.mark.parametrize("width", [40, 51, 60, 80])
def test_the_table_fits_its_terminal_and_keeps_its_numbers(plan: FoldPlan, width: int) -> None:
    large = Account({term: num_bytes * 1000 + 123_456 for term, num_bytes in BREAKDOWN.items()})
    costs = {"chunked_loss": "no slowdown"}
    text = printed(plan, large, budget=24 * 2**30, minimum=23_456_789_012, option_costs=costs,
                   width=width)  # fmt: skip
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "…" not in text
    assert all(name in text for name in TERM_NAMES.values()), "names are whole at any width"
    rows = cells(text)
    assert ["predicted", "peak", "29.93", "GB", "100.0%"] in rows
    assert any(row[:5] == ["optimizer", "state", "3.1", "GB", "10.4%"] for row in rows)
    assert "no slowdown" in text
    assert ("#" in text) == (width > 50)
    if plan.levels != uniform_plan(2).levels:
        assert ["79", *"1122224"] in rows


def test_host_memory_is_beside_the_peak() -> None:
    account = replace(ACCOUNT, host_bytes=17_700_000_000)
    summed = with_options(gradient_release=True, grad_offload=True)
    text = printed(summed, account)
    assert ["host", "memory", "17.7", "GB"] in cells(text)
    assert "gradient release on, summed in host memory" in " ".join(text.split())
    assert "data.micro_batch_size" in printed(summed, account, budget=PEAK)
    assert json.loads(plan_json(summed, account, None, None))["host_bytes"] == 17_700_000_000
    assert "host memory" not in printed(minimum=9_000_000)
    least = rendered(plan_table(UNIFORM.plan, ACCOUNT, PEAK, 9_000_000, minimum_host_bytes=10**9))
    assert "works is 9MB, with 1 GB of host memory" in least
    found = plan_json(UNIFORM.plan, ACCOUNT, PEAK, 9_000_000, minimum_host_bytes=10**9)
    assert json.loads(found)["minimum_host_bytes"] == 10**9


def test_the_table_shows_the_memory_options_in_words() -> None:
    text = " ".join(printed().split())
    assert "batch 8 as 2 micro-batches of 4" in text
    assert "chunked loss on" in text
    assert "activation checkpointing off" in text
    assert "optimizer state float32" in text
    assert "4, no accumulation" in printed(with_options(accumulate_grad_batches=1))
    selective = with_options(activation_checkpointing=True, selective_checkpointing=True)
    assert ["activation", "checkpointing", "selective"] in cells(printed(selective))


@pytest.mark.parametrize("width", [40, 200])
def test_every_option_cost_is_shown(width: int) -> None:
    names = {field.name for field in fields(MemoryOptions)} - {"micro_batch_size"}
    costs = {name: f"cost-of-{name}" for name in names}
    text = printed(with_options(weights_dtype="int8"), option_costs=costs, width=width)
    assert all(f"cost-of-{name}" in text for name in names)


def test_the_table_says_what_is_left_or_missing() -> None:
    assert "32 MB with 2.072 MB to spare" in printed(budget=32_000_000)
    text = printed(budget=20_000_000, minimum=28_990_001)
    assert "Does not fit the budget of 20 MB: it needs 9.928 MB more" in text
    assert "29MB" in text
    assert "budget" not in printed()


def test_equal_levels_share_a_row() -> None:
    text = printed()
    assert "level 2: 4 columns" in text
    assert "gate" not in text
    rows = cells(printed(mixed_plan(12)))
    assert ["layers", "q", "k", "v", "o", "gate", "up", "down"] in rows
    assert ["0-10", *"2222222"] in rows
    assert ["11", *"1122224"] in rows


def test_the_table_shows_matrices_that_are_not_folded_or_outside_the_layers() -> None:
    plan = mixed_plan(2)
    levels = {name: level for name, level in plan.levels.items() if "0.mlp.gate" not in name}
    text = printed(replace(plan, levels={**levels, "lm_head.weight": 4}))
    assert ["0", *"2222-22"] in cells(text)
    assert "lm_head.weight at level 4" in text


OFF = replace(OPTIONS, chunked_loss=False, state_dtype="int8", state_offload=True)
NEARBY = [
    NearbyBudget(10, 35_200_000, replace(uniform_plan(1), memory_options=OFF), 34_000_000),
    NearbyBudget(-10, 28_800_000, None, None),
]


def test_the_table_says_what_other_budgets_would_change() -> None:
    lines = printed(nearby_budgets=NEARBY, width=200).splitlines()
    (more,) = [line for line in lines if "35.2 MB (+10 %)" in line]
    for change in ("mean level 1.00 instead of 2.00", "chunked loss off", "int8 in host memory"):
        assert change in more
    assert any("28.8 MB (-10 %): nothing fits" in line for line in lines)
    same = printed(nearby_budgets=[replace(NEARBY[0], plan=UNIFORM.plan)])
    assert "35.2 MB (+10 %): no change" in same


def test_json_has_nearby_budgets_if_there_are_any() -> None:
    found = json.loads(plan_json(UNIFORM.plan, ACCOUNT, 32_000_000, None, NEARBY))
    more, less = found["nearby_budgets"]
    assert more["memory_options"] == asdict(OFF)
    assert (more["percent"], more["budget_bytes"], more["feasible"]) == (10, 35_200_000, True)
    assert (more["predicted_peak_bytes"], more["mean_level"]) == (34_000_000, 1.0)
    assert (less["percent"], less["budget_bytes"], less["feasible"]) == (-10, 28_800_000, False)
    assert less["predicted_peak_bytes"] is less["mean_level"] is less["memory_options"] is None


def test_where_memory_is_short_the_table_names_the_settings_that_free_some() -> None:
    text = printed(budget=PEAK, width=200)
    assert "logits and loss (8.4 MB)" in text
    assert "optimizer state (3.1 MB)" in text
    assert "data.micro_batch_size (now 4) or data.sequence_length (up to 14.5 MB)" in text
    released = with_options(accumulate_grad_batches=1, gradient_release=True)
    text = printed(released, budget=PEAK, width=200)
    assert "data.batch_size (now 4) or data.sequence_length" in text
    text = printed(with_options(micro_batch_size=1), budget=PEAK, width=200)
    assert "data.sequence_length" in text
    assert "batch_size" not in text
    # Adam folds nothing, state in host memory takes none, and there may be enough.
    for plan in (uniform_plan(0), replace(UNIFORM.plan, memory_options=OFF)):
        assert "To fold less" not in printed(plan, budget=PEAK)
    for budget in (2 * PEAK, None):
        assert "To fold less" not in printed(budget=budget)
    state = Account({**BREAKDOWN, "optimizer_state": 10**8})
    assert "optimizer state (100 MB)." in printed(UNIFORM.plan, state)


# ---- plan --tensors

HOLDINGS = [
    TensorGroup(
        90_177_536,
        32,
        "optimizer_state",
        Origin("model.layers.*.mlp.gate_proj.weight exp_avg", "throughout", (9, 5), torch.bfloat16),
    ),
    TensorGroup(
        8_388_608, 32, "activations", Origin("model.layers.*", "forward", (1, 2), torch.int8)
    ),
    TensorGroup(4, 1, "loss", Origin("loss", "backward", (), torch.float32)),
]


@pytest.mark.parametrize("width", [40, 80])
def test_the_tensor_table_shows_the_largest_and_how_much_is_left_out(width: int) -> None:
    text = " ".join(rendered(tensor_table(HOLDINGS, 1), width).split())
    assert "2.886 GB 32 x 90.18 MB model.layers.*.mlp.gate_proj.weight exp_avg" in text
    assert "optimizer state, throughout: 9 x 5 bfloat16" in text
    assert "268.4 MB 2 more kinds" in text
    text = " ".join(rendered(tensor_table(HOLDINGS, 3), width).split())
    assert "logits and loss, backward: scalar float32" in text
    assert "more kinds" not in text


def test_json_has_the_largest_tensors_if_they_were_asked_for() -> None:
    largest = tensors_as_json(HOLDINGS, 2)
    found = json.loads(plan_json(UNIFORM.plan, ACCOUNT, None, None, tensors=largest))
    assert [entry["bytes"] for entry in found["tensors"]] == [32 * 90_177_536, 32 * 8_388_608]
    assert found["tensors"][1] == {
        **{"bytes": 32 * 8_388_608, "count": 32, "term": "activations", "dtype": "int8"},
        **{"made_by": "model.layers.*", "phase": "forward", "shape": [1, 2]},
    }
    assert "tensors" not in json.loads(plan_json(UNIFORM.plan, ACCOUNT, None, None))

import io
import json
from dataclasses import asdict, fields, replace
from types import MappingProxyType

import pytest
import torch
from rich.console import Console

from foam_lightning.memory.account import Account
from foam_lightning.memory.inventory import Holding
from foam_lightning.memory.timeline import Origin
from foam_lightning.plan import FoldPlan, MemoryOptions
from tests.search_results import ACCOUNT, BREAKDOWN, MIXED, PEAK, UNIFORM, mixed_plan, uniform_plan
from tuner.planning.planner import NearbyBudget
from tuner.report.plan_table import plan_json, plan_table, tensor_table, tensors_as_json


def printed(
    plan: FoldPlan,
    account: Account = ACCOUNT,
    *,
    budget=None,
    minimum=None,
    nearby_budgets=(),
    option_costs=MappingProxyType({}),
    width=80,
) -> str:
    console = Console(width=width, no_color=True, file=io.StringIO())
    console.print(plan_table(plan, account, budget, minimum, nearby_budgets, option_costs))
    return console.file.getvalue()


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# ---- plan --format json


def test_json_has_the_keys_of_the_contract_in_order() -> None:
    found = json.loads(plan_json(MIXED.plan, ACCOUNT, 32_000_000, 9_000_000))
    assert list(found) == [
        "schema",
        "feasible",
        "budget_bytes",
        "predicted_peak_bytes",
        "minimum_budget_bytes",
        "binding",
        "breakdown",
        "memory_options",
        "levels",
    ]
    assert found["schema"] == "foam-lightning/plan/3"
    assert list(found["breakdown"]) == list(BREAKDOWN)
    assert found["memory_options"] == asdict(MIXED.plan.memory_options)
    assert {
        "micro_batch_size",
        "accumulate_grad_batches",
        "activation_checkpointing",
        "gradient_release",
        "chunked_loss",
        "state_dtype",
    } < set(found["memory_options"])
    assert found["levels"] == MIXED.plan.levels
    assert found["binding"] == "loss"
    assert (found["budget_bytes"], found["minimum_budget_bytes"]) == (32_000_000, 9_000_000)


def test_json_breakdown_adds_up_to_the_peak() -> None:
    found = json.loads(plan_json(MIXED.plan, ACCOUNT, None, None))
    assert sum(found["breakdown"].values()) == found["predicted_peak_bytes"] == PEAK


@pytest.mark.parametrize(
    ("budget", "feasible"), [(None, True), (PEAK, True), (PEAK - 1, False)], ids=str
)
def test_json_says_whether_the_plan_fits(budget: int | None, feasible: bool) -> None:
    found = json.loads(plan_json(UNIFORM.plan, ACCOUNT, budget, None))
    assert found["feasible"] is feasible
    assert found["budget_bytes"] == budget
    assert found["minimum_budget_bytes"] is None
    assert found["levels"] == UNIFORM.plan.levels


# ---- plan --format table


@pytest.mark.parametrize("plan", [uniform_plan(2), mixed_plan(80)], ids=["uniform", "mixed"])
@pytest.mark.parametrize("budget", [None, 10**6, 24 * 2**30], ids=str)
def test_the_table_fits_80_columns(plan: FoldPlan, budget: int | None) -> None:
    large = Account({term: num_bytes * 1000 + 123_456 for term, num_bytes in BREAKDOWN.items()})
    text = printed(plan, large, budget=budget, minimum=23_456_789_012)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text


def test_the_table_shows_every_term_and_its_share() -> None:
    rows = cells(printed(UNIFORM.plan))
    assert ["loss", "8.4", "MB", "28.1%", "#" * 24] in rows
    assert ["workspace", "0", "B", "0.0%"] in rows
    assert ["predicted", "peak", "29.93", "MB", "100.0%"] in rows


def test_the_table_shows_the_levers_in_words() -> None:
    text = printed(UNIFORM.plan)
    assert ["micro-batch", "4", "x", "2", "accumulated"] in cells(text)
    assert ["chunked", "loss", "on"] in cells(text)
    assert ["activation", "checkpointing", "off"] in cells(text)
    assert ["state", "float32"] in cells(text)


def test_the_table_says_what_a_lever_costs_beside_it() -> None:
    text = printed(UNIFORM.plan, option_costs={"chunked_loss": "a bit", "state_offload": "a lot"})
    assert ["chunked", "loss", "on", "a", "bit"] in cells(text)
    assert ["state", "float32", "a", "lot"] in cells(text)


def test_every_lever_that_has_a_price_has_a_row() -> None:
    names = {field.name for field in fields(MemoryOptions)} - {"micro_batch_size"}
    text = printed(
        UNIFORM.plan, option_costs={name: f"price-of-{name}" for name in names}, width=200
    )
    assert all(f"price-of-{name}" in text for name in names)


def test_the_table_says_what_is_left_or_lacking() -> None:
    assert "Fits the budget of 32 MB, with 2.072 MB left." in printed(
        UNIFORM.plan, budget=32_000_000
    )
    text = printed(UNIFORM.plan, budget=20_000_000, minimum=28_990_001)
    assert "Does not fit the budget of 20 MB: 9.928 MB more are needed." in text
    assert "The smallest budget that works is 29MB." in text
    assert "budget" not in printed(UNIFORM.plan)


def test_the_table_says_a_uniform_level_in_words() -> None:
    text = printed(UNIFORM.plan)
    assert "Every matrix at level 2: 4 columns share their state." in text
    assert "gate" not in text


def test_the_table_joins_equal_layers() -> None:
    rows = cells(printed(mixed_plan(12)))
    assert ["level", "in", "layers", "q", "k", "v", "o", "gate", "up", "down"] in rows
    assert ["0-10", *"2222222"] in rows
    assert ["11", *"1122224"] in rows


def test_the_table_names_matrices_that_do_not_fold_or_sit_outside_the_layers() -> None:
    plan = mixed_plan(2)
    levels = {name: level for name, level in plan.levels.items() if "gate" not in name}
    text = printed(replace(plan, levels={**levels, "lm_head.weight": 4}))
    assert ["0", *"2222-22"] in cells(text)
    assert "lm_head.weight at level 4" in text


OFF = replace(
    UNIFORM.plan.memory_options, chunked_loss=False, state_dtype="int8", state_offload=True
)
NEIGHBOURS = [
    NearbyBudget(10, 35_200_000, replace(uniform_plan(1), memory_options=OFF), 34_000_000),
    NearbyBudget(-10, 28_800_000, None, None),
]


def test_the_table_says_what_other_budgets_would_change() -> None:
    lines = printed(UNIFORM.plan, nearby_budgets=NEIGHBOURS, width=200).splitlines()
    start = "With 35.2 MB (10 % more): mean level 1.00 instead of 2.00, chunked loss off, "
    assert f"{start}state int8, in host memory." in map(str.rstrip, lines)
    assert "With 28.8 MB (10 % less): nothing fits." in map(str.rstrip, lines)
    same = printed(UNIFORM.plan, nearby_budgets=[replace(NEIGHBOURS[0], plan=UNIFORM.plan)])
    assert "With 35.2 MB (10 % more): nothing changes." in same


def test_json_has_the_neighbours_where_there_are_any() -> None:
    found = json.loads(plan_json(UNIFORM.plan, ACCOUNT, 32_000_000, None, NEIGHBOURS))
    assert found["nearby_budgets"] == [
        {
            "percent": 10,
            "budget_bytes": 35_200_000,
            "feasible": True,
            "predicted_peak_bytes": 34_000_000,
            "mean_level": 1.0,
            "memory_options": asdict(OFF),
        },
        {
            "percent": -10,
            "budget_bytes": 28_800_000,
            "feasible": False,
            "predicted_peak_bytes": None,
            "mean_level": None,
            "memory_options": None,
        },
    ]


def test_the_table_says_what_binds_and_what_makes_room() -> None:
    text = printed(UNIFORM.plan, budget=PEAK, width=200)
    assert "The largest term is loss (8.4 MB); levels change only the optimizer state" in text
    assert "14.5 MB of activations and loss, by a smaller data.micro_batch_size (now 4)" in text
    released = replace(
        UNIFORM.plan.memory_options, accumulate_grad_batches=1, gradient_release=True
    )
    text = printed(replace(UNIFORM.plan, memory_options=released), budget=PEAK, width=200)
    assert "by a smaller data.batch_size (now 4) or data.sequence_length" in text
    single = replace(
        UNIFORM.plan, memory_options=replace(UNIFORM.plan.memory_options, micro_batch_size=1)
    )
    assert "by a smaller data.sequence" in printed(single, budget=PEAK, width=200)
    # Adam needs no room, what is in host memory takes none, and there may be enough.
    for plan in (uniform_plan(0), replace(UNIFORM.plan, memory_options=OFF)):
        assert "Room" not in printed(plan, budget=PEAK)
    for budget in (2 * PEAK, None):
        assert "Room" not in printed(UNIFORM.plan, budget=budget)
    state = Account({**BREAKDOWN, "optimizer_state": 10**8})
    assert "The largest term is optimizer state (100 MB).\n" in printed(
        uniform_plan(2), state
    ).replace(" \n", "\n").replace("  ", "")


@pytest.mark.parametrize(
    ("whole", "selective", "word"),
    [(False, False, "off"), (True, False, "on"), (True, True, "selective")],
)
def test_the_table_tells_kinds_of_checkpointing_apart(
    whole: bool, selective: bool, word: str
) -> None:
    memory_options = replace(
        UNIFORM.plan.memory_options,
        activation_checkpointing=whole,
        selective_checkpointing=selective,
    )
    text = printed(replace(UNIFORM.plan, memory_options=memory_options))
    assert ["activation", "checkpointing", word] in cells(text)


# ---- plan --tensors

HOLDINGS = [
    Holding(
        90_177_536,
        32,
        "optimizer_state",
        Origin("model.layers.*.mlp.gate_proj.weight exp_avg", "throughout", (9, 5), torch.bfloat16),
    ),
    Holding(8_388_608, 32, "activations", Origin("model.layers.*", "forward", (1, 2), torch.int8)),
    Holding(4, 1, "loss", Origin("loss", "backward", (), torch.float32)),
]


def test_the_tensor_table_says_what_is_large_and_how_much_is_left_out() -> None:
    console = Console(width=80, no_color=True, file=io.StringIO())
    console.print(tensor_table(HOLDINGS, 1))
    rows = cells(console.file.getvalue())
    assert [
        *["2.886", "GB", "32", "x", "90.18", "MB", "model.layers.*.mlp.gate_proj.weight", "exp_avg"]
    ] in rows
    assert ["optimizer", "state,", "throughout:", "9", "x", "5", "bfloat16"] in rows
    assert ["268.4", "MB", "2", "kinds", "more"] in rows
    console.print(tensor_table(HOLDINGS, 3))
    rows = cells(console.file.getvalue())
    assert ["loss,", "backward:", "scalar", "float32"] in rows
    assert ["0", "B"] not in [row[:2] for row in rows]


def test_json_has_the_largest_tensors_where_they_were_asked_for() -> None:
    largest = tensors_as_json(HOLDINGS, 2)
    found = json.loads(plan_json(UNIFORM.plan, ACCOUNT, None, None, tensors=largest))
    assert [entry["bytes"] for entry in found["tensors"]] == [32 * 90_177_536, 32 * 8_388_608]
    assert found["tensors"][1] == {
        "bytes": 32 * 8_388_608,
        "count": 32,
        "term": "activations",
        "made_by": "model.layers.*",
        "phase": "forward",
        "shape": [1, 2],
        "dtype": "int8",
    }
    assert "tensors" not in json.loads(plan_json(UNIFORM.plan, ACCOUNT, None, None))


# ---- the report

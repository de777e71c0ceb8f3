import io
import json
import math
import struct
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from rich.console import Console

from foam_lightning.memory.account import Account
from foam_lightning.memory.inventory import Holding
from foam_lightning.memory.timeline import Origin
from foam_lightning.plan import FoldPlan, Levers
from foam_lightning.roles import ROLES
from foam_lightning.units import in_words
from tuner.finals import Candidate
from tuner.neighbours import Neighbour
from tuner.objective import ShortRun, paired_difference
from tuner.outcome import Outcome, Searched
from tuner.pictures import draw_plan, save
from tuner.plan_view import level_grid, plan_json, plan_table
from tuner.report import write_report
from tuner.tensor_view import tensor_table, tensors_as_json

ADAM_STATE = 4_096_000
BREAKDOWN = {
    "weights": 5_300_000,
    "gradients": 5_300_000,
    "optimizer_state": 3_100_000,
    "activations": 6_100_000,
    "loss": 8_400_000,
    "workspace": 0,
    "context": 600_000,
    "margin": 1_128_000,
}
ACCOUNT = Account(BREAKDOWN)
ADAM_ACCOUNT = Account({**BREAKDOWN, "optimizer_state": 10_600_000})
PEAK = 29_928_000
RMS = {role: {0: 0.44, 1: 0.62, 2: 0.65, 4: 0.67, 8: 0.68} for role in ROLES}


def name_of(layer: int, role: str) -> str:
    block = "self_attn" if role in "qkvo" else "mlp"
    return f"model.layers.{layer}.{block}.{role}_proj.weight"


def uniform_plan(level: int, num_layers: int = 4) -> FoldPlan:
    return FoldPlan(
        model={"hidden_size": 128},
        levels={name_of(i, role): level for i in range(num_layers) for role in ROLES},
        scales={
            name_of(i, role): 0.25 if level or role in ("q", "k") else 0.1
            for i in range(num_layers)
            for role in ROLES
        },
        lr=0.02,
        levers=Levers(micro_batch_size=4, accumulate_grad_batches=2, chunked_loss=True),
    )


def mixed_plan(num_layers: int = 4) -> FoldPlan:
    """Make all layers alike but the last, which has its q and k lower and its down higher."""
    plan = uniform_plan(2, num_layers)
    last = {
        name_of(num_layers - 1, role): level for role, level in (("q", 1), ("k", 1), ("down", 4))
    }
    scales = {name: {1: 0.2, 2: 0.25, 4: 0.3}[level] for name, level in last.items()}
    return replace(plan, levels={**plan.levels, **last}, scales={**plan.scales, **scales})


def run_at(loss: float) -> ShortRun:
    """Make a run whose batches differ from each other in the same way in every run."""
    tokens = [1000] * 16
    return ShortRun([(loss + 0.002 * (i % 5 - 2)) * 1000 for i in range(16)], tokens)


def outcome_of(winner: Candidate, *others: Candidate, searched: list[Searched]) -> Outcome:
    return Outcome(
        winner=winner,
        finalists=[*others, winner],
        against_winner={c.label: paired_difference([c.run], [winner.run]) for c in others},
        searched=searched,
        update_rms=RMS,
        adam_state_bytes=ADAM_STATE,
        short_run_steps=160,
        reason=f"{winner.label} is better than every other finalist beyond its interval",
    )


REFERENCE = Candidate("reference", uniform_plan(0), run_at(3.48), ADAM_STATE)
UNIFORM = Candidate("uniform", uniform_plan(2), run_at(3.42), ADAM_STATE // 4)
HIGHER = Candidate("uniform", uniform_plan(3), run_at(3.393), ADAM_STATE // 8)
MIXED = Candidate("mixed", mixed_plan(), run_at(3.38), ADAM_STATE // 4)
DIVERGED = Candidate("uniform", uniform_plan(1), run_at(math.nan), ADAM_STATE // 2)

SEARCHED = [
    Searched("uniform", "uniform level 0, lr 0.02, scale 0.05", 0, ADAM_STATE, 3.701),
    Searched("uniform", "uniform level 0, lr 0.04, scale 0.1", 0, ADAM_STATE, 5.812),
    Searched("uniform", "uniform level 1, lr 0.02, scale 0.25", 1, ADAM_STATE // 2, 3.641),
    Searched("uniform", "uniform level 2, lr 0.02, scale 0.25", 2, ADAM_STATE // 4, 3.652),
    Searched("uniform", "uniform level 3, lr 0.02, scale 0.25", 3, ADAM_STATE // 8, 3.668),
    Searched("uniform", "uniform level 8, lr 0.02, scale 0.25", 8, ADAM_STATE // 256, 3.697),
    Searched("uniform", "uniform level 2, lr 0.033, scale 0.4", 2, ADAM_STATE // 4, 3.628),
    Searched("uniform", "uniform level 2, lr 0.05, scale 0.6", 2, ADAM_STATE // 4, None),
    Searched("uniform", "uniform level 1, lr 0.049, scale 0.62", 1, ADAM_STATE // 2, None),
    Searched("mixed", "mixed 0", None, 1_020_000, 3.621),
    Searched("mixed", "mixed 1", None, 1_023_000, 3.611),
    Searched("mixed", "mixed 2", None, 1_021_000, 3.659),
]
TUNED = outcome_of(MIXED, REFERENCE, UNIFORM, HIGHER, searched=SEARCHED)
NO_REFERENCE = outcome_of(UNIFORM, HIGHER, searched=SEARCHED[3:6])
ALL_DIVERGED = outcome_of(UNIFORM, DIVERGED, searched=SEARCHED[7:9])
ADAM_WINS = outcome_of(REFERENCE, searched=SEARCHED[:1])


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def printed(
    plan: FoldPlan,
    account: Account = ACCOUNT,
    *,
    budget=None,
    minimum=None,
    neighbours=(),
    prices=MappingProxyType({}),
    width=80,
) -> str:
    console = Console(width=width, no_color=True, file=io.StringIO())
    console.print(plan_table(plan, account, budget, minimum, neighbours, prices))
    return console.file.getvalue()


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


CASES = {
    "mixed": (TUNED, ACCOUNT, ADAM_ACCOUNT, 32_000_000),
    "no-reference": (NO_REFERENCE, ACCOUNT, None, 32_000_000),
    "diverged": (ALL_DIVERGED, ACCOUNT, ADAM_ACCOUNT, 32_000_000),
    "adam-wins": (ADAM_WINS, ADAM_ACCOUNT, ADAM_ACCOUNT, 80_000_000),
    "large-budget": (TUNED, ACCOUNT, ADAM_ACCOUNT, 10**12),
    "nothing-searched": (outcome_of(UNIFORM, searched=[]), ACCOUNT, None, 32_000_000),
}


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
        "levers",
        "levels",
    ]
    assert found["schema"] == "foam-lightning/plan/1"
    assert list(found["breakdown"]) == list(BREAKDOWN)
    assert found["levers"] == asdict(MIXED.plan.levers)
    assert {
        "micro_batch_size",
        "accumulate_grad_batches",
        "activation_checkpointing",
        "gradient_release",
        "chunked_loss",
        "state_dtype",
    } < set(found["levers"])
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
    text = printed(UNIFORM.plan, prices={"chunked_loss": "a bit", "state_offload": "a lot"})
    assert ["chunked", "loss", "on", "a", "bit"] in cells(text)
    assert ["state", "float32", "a", "lot"] in cells(text)


def test_every_lever_that_has_a_price_has_a_row() -> None:
    names = {field.name for field in fields(Levers)} - {"micro_batch_size"}
    text = printed(UNIFORM.plan, prices={name: f"price-of-{name}" for name in names}, width=200)
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


OFF = replace(UNIFORM.plan.levers, chunked_loss=False, state_dtype="int8", state_offload=True)
NEIGHBOURS = [
    Neighbour(10, 35_200_000, replace(uniform_plan(1), levers=OFF), 34_000_000),
    Neighbour(-10, 28_800_000, None, None),
]


def test_the_table_says_what_other_budgets_would_change() -> None:
    lines = printed(UNIFORM.plan, neighbours=NEIGHBOURS, width=200).splitlines()
    start = "With 35.2 MB (10 % more): mean level 1.00 instead of 2.00, chunked loss off, "
    assert f"{start}state int8, in host memory." in map(str.rstrip, lines)
    assert "With 28.8 MB (10 % less): nothing fits." in map(str.rstrip, lines)
    same = printed(UNIFORM.plan, neighbours=[replace(NEIGHBOURS[0], plan=UNIFORM.plan)])
    assert "With 35.2 MB (10 % more): nothing changes." in same


def test_json_has_the_neighbours_where_there_are_any() -> None:
    found = json.loads(plan_json(UNIFORM.plan, ACCOUNT, 32_000_000, None, NEIGHBOURS))
    assert found["neighbours"] == [
        {
            "percent": 10,
            "budget_bytes": 35_200_000,
            "feasible": True,
            "predicted_peak_bytes": 34_000_000,
            "mean_level": 1.0,
            "levers": asdict(OFF),
        },
        {
            "percent": -10,
            "budget_bytes": 28_800_000,
            "feasible": False,
            "predicted_peak_bytes": None,
            "mean_level": None,
            "levers": None,
        },
    ]


def test_the_table_says_what_binds_and_what_makes_room() -> None:
    text = printed(UNIFORM.plan, budget=PEAK, width=200)
    assert "The largest term is loss (8.4 MB); levels change only the optimizer state" in text
    assert "14.5 MB of activations and loss, by a smaller data.micro_batch_size (now 4)" in text
    released = replace(UNIFORM.plan.levers, accumulate_grad_batches=1, gradient_release=True)
    text = printed(replace(UNIFORM.plan, levers=released), budget=PEAK, width=200)
    assert "by a smaller data.batch_size (now 4) or data.sequence_length" in text
    single = replace(UNIFORM.plan, levers=replace(UNIFORM.plan.levers, micro_batch_size=1))
    assert "by a smaller data.sequence" in printed(single, budget=PEAK, width=200)
    # Adam needs no room, what is in host memory takes none, and there may be enough.
    for plan in (uniform_plan(0), replace(UNIFORM.plan, levers=OFF)):
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
    levers = replace(
        UNIFORM.plan.levers, activation_checkpointing=whole, selective_checkpointing=selective
    )
    text = printed(replace(UNIFORM.plan, levers=levers))
    assert ["activation", "checkpointing", word] in cells(text)


# ---- plan --picture


@pytest.mark.parametrize("num_layers", [0, 1, 32, 80])
@pytest.mark.parametrize("budget", [None, PEAK, 100 * PEAK], ids=str)
def test_a_plan_is_one_picture(tmp_path: Path, num_layers: int, budget: int | None) -> None:
    grid, _ = level_grid(mixed_plan(num_layers).levels if num_layers else {})
    figure = draw_plan({"Adam": ADAM_ACCOUNT, "plan": ACCOUNT}, budget, grid)
    save(figure, tmp_path / "plan.png")
    width, height = png_size(tmp_path / "plan.png")
    assert width == 1260
    assert height == pytest.approx(570 + 150 * min(11, 2 + 0.28 * max(6, num_layers)), abs=1) or (
        num_layers == 0 and height == 570
    )
    texts = {text.get_text() for part in figure.subfigs for text in part.axes[0].texts}
    said = [text for text in texts if text.startswith("budget")]
    assert said == ([] if budget is None else [f"budget {in_words(budget)}"]) or (
        budget == 100 * PEAK and said[0].endswith("not drawn")
    )
    drawn = [len(part.axes) for part in figure.subfigs]
    assert drawn == ([1, 2] if num_layers else [1])  # the heat map has a colour bar


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


@pytest.mark.parametrize("case", CASES)
def test_the_pictures_are_png_files_of_sensible_size(tmp_path: Path, case: str) -> None:
    paths = write_report(tmp_path, *CASES[case])
    assert paths == {name: tmp_path / f"{name}.png" for name in ("levels", "memory", "search")}
    for path in paths.values():
        width, height = png_size(path)
        assert 800 <= width <= 2000
        assert 300 <= height <= 2000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "levels.png",
        "memory.png",
        "report.md",
        "search.png",
    ]


def test_the_pictures_hold_a_deep_model(tmp_path: Path) -> None:
    deep = replace(MIXED, plan=mixed_plan(80))
    paths = write_report(tmp_path, outcome_of(deep, searched=SEARCHED), ACCOUNT, None, PEAK)
    assert png_size(paths["levels"])[1] <= 2000


@pytest.mark.parametrize("case", CASES)
def test_the_report_names_the_reason_first_and_every_finalist_and_run(
    tmp_path: Path, case: str
) -> None:
    outcome, account, *rest = CASES[case]
    write_report(tmp_path, outcome, account, *rest)
    text = (tmp_path / "report.md").read_text(encoding="ascii")
    first = text.splitlines()[2]
    assert first == f"{outcome.reason[0].upper()}{outcome.reason[1:]}."
    for candidate in outcome.finalists:
        name = f"**{candidate.label}**" if candidate is outcome.winner else candidate.label
        assert f"\n| {name} |" in text
    for run in outcome.searched:
        assert f"\n| {run.description} |" in text
    for picture in ("levels.png", "memory.png", "search.png"):
        assert f"({picture})" in text


def test_the_report_gives_figures_that_can_be_checked_by_hand(tmp_path: Path) -> None:
    write_report(tmp_path, *CASES["mixed"])
    lines = (tmp_path / "report.md").read_text(encoding="ascii").splitlines()
    assert (
        "| uniform level 2 | 1.024 MB (25.0% of Adam's) | 3.4198 | +0.0400 +- 0.0196 | 0.02 | "
        "0.25 |"
    ) in lines
    assert any(line.endswith(" | 0.02 | 0.1 (q, k: 0.25) |") for line in lines)
    assert "| 1 | 0.2 | 0.2 | - | - | - | - | - |" in lines
    assert "| 4 | - | - | - | - | - | - | 0.3 |" in lines
    assert any("| +0.0130 +- 0.0196 (undecided) |" in line for line in lines)
    assert "| role | level 0 | level 1 | level 2 | level 4 | level 8 |" in lines
    assert "| q | 0.440 | 0.620 | 0.650 | 0.670 | 0.680 |" in lines
    assert any(line.endswith("FOAM would have taken. Nothing rests on it.") for line in lines)
    assert "| optimizer state | 10.6 MB | 3.1 MB |" in lines
    assert "| **peak** | **37.43 MB** | **29.93 MB** |" in lines
    assert "| 0-2 | 2 | 2 | 2 | 2 | 2 | 2 | 2 |" in lines
    assert any("320 steps each on another seed" in line for line in lines)


def test_the_report_says_what_diverged_and_what_was_not_measured(tmp_path: Path) -> None:
    outcome = replace(ALL_DIVERGED, update_rms={})
    write_report(tmp_path, outcome, *CASES["diverged"][1:])
    text = (tmp_path / "report.md").read_text(encoding="ascii")
    assert "2.048 MB (50.0% of Adam's) | diverged | diverged |" in text
    assert "| 2 | 1.024 MB (25.0% of Adam's) | diverged |" in text
    assert "Not measured: it takes a run of Adam that fits the budget" in text
    assert "Every matrix at scale 0.25." in text
    assert "nan" not in text


def test_equal_outcomes_give_equal_files(tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        write_report(folder, *CASES["mixed"])
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]

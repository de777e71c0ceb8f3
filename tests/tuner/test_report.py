import re
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.support.search_results import (
    ACCOUNT,
    ADAM_ACCOUNT,
    ADAM_WINS,
    ALL_DIVERGED,
    MIXED,
    NO_REFERENCE,
    ONE_DIVERGED,
    PEAK,
    TRIALS,
    TUNED,
    UNIFORM,
    mixed_plan,
    search_result_of,
)
from tuner.report.plan_plots import draw_plan
from tuner.report.plan_table import level_grid
from tuner.report.report import write_report
from tuner.report.style import save


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


# ---- plots of a plan

ACCOUNTS = {"Adam": ADAM_ACCOUNT, "FOAM": ACCOUNT}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("num_layers", [0, 1, 32, 80])
def test_a_plan_is_one_picture(tmp_path: Path, num_layers: int) -> None:
    levels = mixed_plan(num_layers).levels if num_layers else {}
    figure = draw_plan(ACCOUNTS, PEAK, level_grid(levels)[0])
    save(figure, tmp_path / "plan.png")
    width, height = png_size(tmp_path / "plan.png")
    assert width == 1260
    assert 400 <= height <= 1000
    if 0 < num_layers <= 32:
        cells = [text for text in texts(figure) if text.isdigit()]
        assert sorted(map(int, cells)) == sorted(levels.values())


def test_every_bar_says_its_peak_and_whether_it_fits() -> None:
    assert [t for t in texts(draw_plan(ACCOUNTS, None, {})) if t.startswith("29.9 MB")] == [
        "29.9 MB"
    ]
    said = texts(draw_plan(ACCOUNTS, 32_000_000, {}))
    assert "29.9 MB\nfits" in said
    assert "37.4 MB\n5.43 MB over" in said
    assert "budget 32 MB" in said


@pytest.mark.parametrize(("budget", "num_lines"), [(None, 0), (PEAK, 1), (100 * PEAK, 0)], ids=str)
def test_the_budget_is_a_line_unless_it_dwarfs_the_bars(budget: int | None, num_lines: int) -> None:
    figure = draw_plan(ACCOUNTS, budget, {})
    lines = [list(line.get_xdata()) for line in figure.axes[0].get_lines()]
    assert lines == [[budget, budget]] * num_lines
    assert any(text.startswith("budget") for text in texts(figure)) == (budget is not None)


# ---- the report

SAID = "The plan is better than Adam."
DEEP = replace(MIXED, plan=mixed_plan(80))
CASES = {
    "mixed": (TUNED, SAID, ACCOUNT, ADAM_ACCOUNT, 32_000_000),
    "no-reference": (NO_REFERENCE, SAID, ACCOUNT, None, 32_000_000),
    "diverged": (ONE_DIVERGED, SAID, ACCOUNT, ADAM_ACCOUNT, 32_000_000),
    "all-diverged": (ALL_DIVERGED, SAID, ACCOUNT, ADAM_ACCOUNT, 32_000_000),
    "adam-wins": (ADAM_WINS, SAID, ADAM_ACCOUNT, ADAM_ACCOUNT, 80_000_000),
    "no trials": (search_result_of(UNIFORM), SAID, ACCOUNT, ADAM_ACCOUNT, 10**12),
    "deep": (search_result_of(DEEP, trials=TRIALS), SAID, ACCOUNT, None, PEAK),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give `report(case)`: the folder of a report, which is written once for all tests."""

    @cache
    def write(case: str) -> Path:
        folder = tmp_path_factory.mktemp("report")
        paths = write_report(folder, *CASES[case])
        assert paths == {path.stem: path for path in folder.glob("*.png")}
        return folder

    return write


def text_of(folder: Path) -> str:
    return (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
def test_the_report_shows_every_plot_that_it_writes(
    report: Callable[[str], Path], case: str
) -> None:
    folder = report(case)
    names = {"losses", "plan"}
    if case in ("mixed", "no-reference"):
        names |= {"curves"}
    if case in ("mixed", "no-reference", "deep"):
        names |= {"ablation"}
    for name in names:
        width, height = png_size(folder / f"{name}.png")
        assert 800 <= width <= 2000
        assert 300 <= height <= 2000
    shown = {f"{name}.png" for name in names}
    assert set(re.findall(r"\(([a-z]+\.png)\)", text_of(folder))) == shown
    assert {path.name for path in folder.iterdir()} == {*shown, "report.md"}


@pytest.mark.parametrize("case", CASES)
def test_the_report_begins_with_the_verdict_and_names_every_finalist_and_run(
    report: Callable[[str], Path], case: str
) -> None:
    search_result, text = CASES[case][0], text_of(report(case))
    _, _, first, _, second, *_ = text.splitlines()
    assert first == SAID
    assert search_result.reason[1:] in second
    for candidate in search_result.finalists:
        name = f"**{candidate.label}**" if candidate is search_result.winner else candidate.label
        assert f"\n| {name} |" in text
    for run in search_result.trials:
        assert f"\n| {run.description} |" in text


def test_the_report_gives_numbers_that_can_be_checked_by_hand(
    report: Callable[[str], Path],
) -> None:
    rows = {
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in text_of(report("mixed")).splitlines()
        if line.startswith("|")
    }
    quarter, whole = "1.024 MB (25.0% of Adam's)", "4.096 MB (100.0% of Adam's)"
    assert {
        *[("uniform level 2", quarter, "2", "3.4197", "+0.040 ± 0.014", "-0.060 ± 0.014",
           "0.02", "0.25")],
        ("split-lr Adam", whole, "2", "3.4798", "+0.100 ± 0.014", "-", "0.033", "0.04"),
        ("1", "0.2", "0.2", "-", "-", "-", "-", "-"),
        ("4", "-", "-", "-", "-", "-", "-", "0.3"),
        ("0-2", *"2222222"),
        ("optimizer state", "10.6 MB", "3.1 MB"),
        ("**peak**", "**37.43 MB**", "**29.93 MB**"),
    } <= rows  # fmt: skip
    (row,) = [row for row in rows if row[0].startswith("a level per matrix") and "160" in row[3]]
    assert row[1] == "mixed 1 (best of 3)"
    assert row[4].startswith("-0.017 ± 0.020 (not significant")


def test_the_report_says_what_diverged(report: Callable[[str], Path]) -> None:
    text = text_of(report("diverged"))
    assert "2.048 MB (50.0% of Adam's) | 1 | diverged | diverged |" in text
    assert "| 2 | 1.024 MB (25.0% of Adam's) | diverged |" in text
    assert "nan" not in text
    assert "nan" not in text_of(report("all-diverged"))


def test_equal_results_give_equal_files(report: Callable[[str], Path], tmp_path: Path) -> None:
    write_report(tmp_path, *CASES["mixed"])
    first, second = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (report("mixed"), tmp_path)
    )
    assert first == second

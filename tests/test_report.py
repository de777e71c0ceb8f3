import re
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from foam_lightning.units import format_bytes
from tests.search_results import (
    ACCOUNT,
    ADAM_ACCOUNT,
    ADAM_WINS,
    ALL_DIVERGED,
    MIXED,
    NO_REFERENCE,
    ONE_DIVERGED,
    PEAK,
    SEARCHED,
    TUNED,
    UNIFORM,
    mixed_plan,
    outcome_of,
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


SAID = "The plan loses less than Adam."
CASES = {
    "mixed": (TUNED, SAID, ACCOUNT, ADAM_ACCOUNT, 32_000_000),
    "no-reference": (NO_REFERENCE, SAID, ACCOUNT, None, 32_000_000),
    "diverged": (ONE_DIVERGED, SAID, ACCOUNT, ADAM_ACCOUNT, 32_000_000),
    "all-diverged": (ALL_DIVERGED, SAID, ACCOUNT, ADAM_ACCOUNT, 32_000_000),
    "adam-wins": (ADAM_WINS, SAID, ADAM_ACCOUNT, ADAM_ACCOUNT, 80_000_000),
    "nothing-searched, large budget": (
        outcome_of(UNIFORM, trials=[]),
        SAID,
        ACCOUNT,
        ADAM_ACCOUNT,
        10**12,
    ),
}


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
    assert said == ([] if budget is None else [f"budget {format_bytes(budget)}"]) or (
        budget == 100 * PEAK and said[0].endswith("not drawn")
    )
    drawn = [len(part.axes) for part in figure.subfigs]
    assert drawn == ([1, 2] if num_layers else [1])  # the heat map has a colour bar


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
    return (folder / "report.md").read_text(encoding="ascii")


@pytest.mark.parametrize("case", CASES)
def test_the_pictures_are_png_files_of_sensible_size(
    report: Callable[[str], Path], case: str
) -> None:
    folder = report(case)
    names = {"losses", "levels", "memory"}
    if case in ("mixed", "no-reference"):
        names |= {"curves", "worth"}
    for name in names:
        width, height = png_size(folder / f"{name}.png")
        assert 800 <= width <= 2000
        assert 300 <= height <= 2000
    shown = {f"{name}.png" for name in names}
    assert set(re.findall(r"\(([a-z]+\.png)\)", text_of(folder))) == shown
    assert {path.name for path in folder.iterdir()} == {*shown, "report.md"}


def test_the_pictures_hold_a_deep_model(tmp_path: Path) -> None:
    deep = replace(MIXED, plan=mixed_plan(80))
    paths = write_report(tmp_path, outcome_of(deep, trials=SEARCHED), SAID, ACCOUNT, None, PEAK)
    assert png_size(paths["levels"])[1] <= 2000


@pytest.mark.parametrize("case", CASES)
def test_the_report_begins_with_the_verdict_and_names_every_finalist_and_run(
    report: Callable[[str], Path], case: str
) -> None:
    search_result, text = CASES[case][0], text_of(report(case))
    _, _, first, _, second, *_ = text.splitlines()
    assert first == SAID
    assert second == f"{search_result.reason[0].upper()}{search_result.reason[1:]}."
    for candidate in search_result.finalists:
        name = f"**{candidate.label}**" if candidate is search_result.winner else candidate.label
        assert f"\n| {name} |" in text
    for run in search_result.trials:
        assert f"\n| {run.description} |" in text


def test_the_report_gives_figures_that_can_be_checked_by_hand(
    report: Callable[[str], Path],
) -> None:
    lines = text_of(report("mixed")).splitlines()
    assert (
        "| plan | state of the matrices | seeds | loss | above the winner | above split-lr Adam | "
        "lr | scales |"
    ) in lines
    assert (
        "| uniform level 2 | 1.024 MB (25.0% of Adam's) | 2 | 3.4197 | +0.0400 +- 0.0139 | "
        "-0.0600 +- 0.0139 | 0.02 | 0.25 |"
    ) in lines
    assert (
        "| split-lr Adam | 4.096 MB (100.0% of Adam's) | 2 | 3.4798 | +0.1000 +- 0.0139 | - | "
        "0.033 | 0.04 |"
    ) in lines
    assert (
        "| levels by matrix instead of level 2 | mixed 1 (best of 3) | uniform level 2, lr 0.033, "
        "scale 0.4 | 160 x 1 | -0.0170 +- 0.0196 (undecided) |"
    ) in lines
    assert "| 1 | 0.2 | 0.2 | - | - | - | - | - |" in lines
    assert "| 4 | - | - | - | - | - | - | 0.3 |" in lines
    assert "| optimizer state | 10.6 MB | 3.1 MB |" in lines
    assert "| **peak** | **37.43 MB** | **29.93 MB** |" in lines
    assert "| 0-2 | 2 | 2 | 2 | 2 | 2 | 2 | 2 |" in lines
    assert any("320 steps each on other seeds" in line for line in lines)


def test_the_report_says_what_diverged(report: Callable[[str], Path]) -> None:
    text = text_of(report("diverged"))
    assert "2.048 MB (50.0% of Adam's) | 1 | diverged | diverged |" in text
    assert "| 2 | 1.024 MB (25.0% of Adam's) | diverged |" in text
    assert "Every matrix at scale 0.25." in text
    assert "nan" not in text
    assert "nan" not in text_of(report("all-diverged"))


def test_equal_outcomes_give_equal_files(report: Callable[[str], Path], tmp_path: Path) -> None:
    write_report(tmp_path, *CASES["mixed"])
    first, second = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (report("mixed"), tmp_path)
    )
    assert first == second

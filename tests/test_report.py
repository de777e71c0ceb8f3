import struct
from dataclasses import replace
from pathlib import Path

import pytest

from foam_lightning.units import in_words
from tests.outcomes import (
    ACCOUNT,
    ADAM_ACCOUNT,
    ADAM_WINS,
    ALL_DIVERGED,
    MIXED,
    NO_REFERENCE,
    PEAK,
    SEARCHED,
    TUNED,
    UNIFORM,
    mixed_plan,
    outcome_of,
)
from tuner.pictures import draw_plan, save
from tuner.plan_view import level_grid
from tuner.report import write_report


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


CASES = {
    "mixed": (TUNED, ACCOUNT, ADAM_ACCOUNT, 32_000_000),
    "no-reference": (NO_REFERENCE, ACCOUNT, None, 32_000_000),
    "diverged": (ALL_DIVERGED, ACCOUNT, ADAM_ACCOUNT, 32_000_000),
    "adam-wins": (ADAM_WINS, ADAM_ACCOUNT, ADAM_ACCOUNT, 80_000_000),
    "large-budget": (TUNED, ACCOUNT, ADAM_ACCOUNT, 10**12),
    "nothing-searched": (outcome_of(UNIFORM, searched=[]), ACCOUNT, None, 32_000_000),
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
    assert said == ([] if budget is None else [f"budget {in_words(budget)}"]) or (
        budget == 100 * PEAK and said[0].endswith("not drawn")
    )
    drawn = [len(part.axes) for part in figure.subfigs]
    assert drawn == ([1, 2] if num_layers else [1])  # the heat map has a colour bar


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

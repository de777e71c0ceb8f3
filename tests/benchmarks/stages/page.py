"""The page of a campaign, made from whatever lines there are, and its plots."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from foam_lightning.storage.atomic import write_text
from foam_lightning.units import format_bytes
from tests.benchmarks.stages.record import PAGE, Line, read_lines
from tuner.report.markdown import markdown_table

CUT_OFF = "cut off"  # the result of a stage that never said how it ended


def write_page(folder: Path, lines: Sequence[Line]) -> None:
    """Write the page of these lines."""
    write_text(folder / PAGE, "\n".join(_page(folder, lines)) + "\n")


def _page(folder: Path, lines: Sequence[Line]) -> Iterator[str]:
    yield "# A campaign on a GPU"
    yield ""
    for line in lines:
        if "campaign" in line:
            yield f"- command: `{line['campaign']}`"
            yield f"- {line['commit']}, begun {line['when']}, on {line['device']}"
            if line["tiny"]:
                yield "- tiny models: shows that the campaign runs, and nothing about speed"
    stages = list(dict.fromkeys(line["stage"] for line in lines if "stage" in line))
    by_stage = {name: [line for line in lines if line.get("stage") == name] for name in stages}
    yield ""
    yield markdown_table(
        ["stage", "result", "seconds", "rows", "failed", "found"],
        [_summary(name, of_stage) for name, of_stage in by_stage.items()],
    )
    for name, of_stage in by_stage.items():
        yield from _section(folder, name, of_stage)


def _summary(name: str, lines: Sequence[Line]) -> list[str]:
    end = _last(lines, "end")
    rows = rows_of(lines)
    failures = sum("failure" in values for values in rows.values())
    seconds = f"{end['seconds']:.0f}" if "seconds" in end else ""
    result, found = str(end.get("end", CUT_OFF)), _last(lines, "note").get("note", "")
    return [name, result, seconds, str(len(rows)), str(failures or ""), _cell("", found)]


def _section(folder: Path, name: str, lines: Sequence[Line]) -> Iterator[str]:
    title = _last(lines, "begin").get("begin", name)
    yield f"\n## {name}: {title}"
    for line in lines:
        if "note" in line:
            yield f"\n{line['note']}"
    if error := _last(lines, "end").get("error"):
        yield f"\n```text\n{error}\n```"
    picture = folder / f"{name}.png"
    if picture.exists():
        yield f"\n![{title}]({picture.name})"
    rows = rows_of(lines)
    if rows:
        columns = list(dict.fromkeys(key for values in rows.values() for key in values))
        yield ""
        yield markdown_table(
            ["", *map(_header, columns)],
            [
                [row, *(_cell(column, values.get(column)) for column in columns)]
                for row, values in rows.items()
            ],
        )


def rows_of(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """Return the values of a stage's rows by name; a later row of a name replaces an earlier."""
    return {line["row"]: line["values"] for line in lines if "row" in line}


def _last(lines: Sequence[Line], key: str) -> Line:
    return next((line for line in reversed(lines) if key in line), {})


def _header(column: str) -> str:
    for unit in ("_bytes_per_second", "_seconds", "_bytes"):  # each cell has it
        column = column.removesuffix(unit)
    return column.replace("_", " ")


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if column.endswith("_bytes"):
            return format_bytes(int(value))
        if column.endswith("_bytes_per_second"):
            return f"{value / 1e9:.4g} GB/s"
        if column.endswith("_seconds"):
            return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.4g} ms"
        return str(value) if isinstance(value, int) else f"{value:.5g}"
    return " ".join(str(value).split()).replace("|", "/")


# ---- plots


def draw_plots(folder: Path) -> None:
    """Draw what rows a plot makes easier to read: memory by step, and time against the bound."""
    lines = read_lines(folder)
    for name in dict.fromkeys(line["stage"] for line in lines if "stage" in line):
        rows = rows_of([line for line in lines if line.get("stage") == name])
        steps = [values for row, values in rows.items() if row.startswith("step ")]
        if steps and "predicted_bytes" in steps[0]:
            _draw_memory(folder / f"{name}.png", steps)
        timed = {row: values for row, values in rows.items() if "bound_seconds" in values}
        if timed:
            _draw_times(folder / f"{name}.png", timed)


def _draw_memory(path: Path, steps: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    from tuner.report.style import BLUE, ORANGE, RED, add_grid, new_figure, save

    budget = steps[0]["budget_bytes"]
    unit, name = (1e9, "GB") if budget >= 1e9 else (1e6, "MB")
    measured = [values["peak_bytes"] / unit for values in steps]
    figure = new_figure(7, 3.5)
    axes = figure.subplots()
    axes.plot(range(1, len(steps) + 1), measured, "o-", color=BLUE, label="measured peak")
    axes.axhline(steps[0]["predicted_bytes"] / unit, color=ORANGE, label="predicted peak")
    axes.axhline(budget / unit, color=RED, linestyle="--", label="budget")
    axes.set(xlabel="step", ylabel=f"memory, {name}")
    axes.set_ylim(0, 1.1 * max(*measured, budget / unit))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right")
    add_grid(axes)
    save(figure, path)


def _draw_times(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    from tuner.report.style import BLUE, ORANGE, add_grid, new_figure, save

    figure = new_figure(7, 0.6 + 0.35 * len(rows))
    axes = figure.subplots()
    names = list(rows)[::-1]
    axes.barh(names, [rows[name]["step_seconds"] * 1e3 for name in names], color=BLUE)
    for place, name in enumerate(names):
        bound = rows[name]["bound_seconds"] * 1e3
        axes.plot([bound, bound], [place - 0.4, place + 0.4], color=ORANGE, linewidth=3)
    axes.set_xlabel("time per step, ms; orange: the bound set by the speed of a copy")
    add_grid(axes, "x")
    save(figure, path)

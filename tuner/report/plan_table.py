"""One plan for people and for scripts: memory, memory options and levels, as a table or as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from types import MappingProxyType

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from foam_lightning.memory.account import Account
from foam_lightning.memory.inventory import Holding
from foam_lightning.memory.timeline import TERMS
from foam_lightning.model.roles import ROLES, layer_of, role_of
from foam_lightning.plan import FoldPlan, MemoryOptions
from foam_lightning.units import at_least, format_bytes
from tuner.planning.planner import NearbyBudget, mean_level


def tensor_table(holdings: Sequence[Holding], most: int) -> Table:
    """Lay the largest tensors out for the terminal, and the rest as one row.

    Args:
        holdings: All of them, the most bytes first.
        most: How many rows to show.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("largest tensors", justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("made by", overflow="fold")
    for holding in holdings[:most]:
        origin = holding.origin
        kind = f"{_shape(origin.shape)} {_dtype(holding)}"
        table.add_row(
            format_bytes(holding.num_bytes),
            f"{holding.count} x {format_bytes(holding.size)}",
            f"{origin.made_by}\n{holding.term.replace('_', ' ')}, {origin.phase}: {kind}",
        )
    rest = holdings[most:]
    if rest:
        table.add_section()
        num_bytes = sum(holding.num_bytes for holding in rest)
        table.add_row(format_bytes(num_bytes), "", f"{len(rest)} kinds more")
    return table


def tensors_as_json(holdings: Sequence[Holding], most: int) -> list[dict[str, object]]:
    """Give the largest tensors as JSON has them.

    Args:
        holdings: All of them, the most bytes first.
        most: How many to give.
    """
    return [
        {
            "bytes": holding.num_bytes,
            "count": holding.count,
            "term": holding.term,
            "made_by": holding.origin.made_by,
            "phase": holding.origin.phase,
            "shape": list(holding.origin.shape),
            "dtype": _dtype(holding),
        }
        for holding in holdings[:most]
    ]


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _dtype(holding: Holding) -> str:
    return str(holding.origin.dtype).removeprefix("torch.")


SCHEMA = "foam-lightning/plan/3"
BREAKDOWN = (*TERMS, "context", "margin")

# The fields of `Memory options` in one row of the table of memory options.
_PRICED = {
    "micro-batch": ("accumulate_grad_batches",),
    "chunked loss": ("chunked_loss",),
    "activation checkpointing": ("activation_checkpointing", "selective_checkpointing"),
    "gradient release": ("gradient_release",),
    "state": ("state_dtype", "state_offload"),
}
_BAR_WIDTH = 24
# Of the budget; a plan below chose its levels for their loss.
_NEARLY_ALL = 0.9
_Grid = dict[int, dict[str, int]]


def plan_table(
    plan: FoldPlan,
    account: Account,
    budget_bytes: int | None,
    minimum_bytes: int | None,
    nearby_budgets: Sequence[NearbyBudget] = (),
    option_costs: Mapping[str, str] = MappingProxyType({}),
) -> Group:
    """Lay a plan out for the terminal: memory, memory options and levels.

    Args:
        plan: The plan.
        account: Its predicted peak.
        budget_bytes: The budget, None where none was given.
        minimum_bytes: The smallest budget that works, None where it was not looked for.
        nearby_budgets: The plans of budgets near this one.
        option_costs: What pulled memory options cost, by field of `Memory options`.
    """
    parts: list[RenderableType] = [_memory_table(account)]
    parts += [Text(line) for line in _verdict(account, budget_bytes, minimum_bytes)]
    parts += [Text(line) for line in _what_binds(plan, account, budget_bytes)]
    parts += [Text(_describe_nearby_budget(neighbour, plan)) for neighbour in nearby_budgets]
    memory_options = Table.grid(padding=(0, 2))
    for name, value in _options_in_words(plan.memory_options).items():
        paid = (option_costs[field] for field in _PRICED[name] if field in option_costs)
        memory_options.add_row(name, value, "; ".join(paid))
    parts += [Text(), memory_options, Text()]
    rows = level_rows(plan.levels)
    if rows:
        grid = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("level in layers", *ROLES):
            grid.add_column(column, justify="left" if column not in ROLES else "right")
        for row in rows:
            grid.add_row(*row)
        parts.append(grid)
    parts += [Text(line) for line in describe_levels(plan.levels)]
    return Group(*parts)


def plan_json(
    plan: FoldPlan,
    account: Account,
    budget_bytes: int | None,
    minimum_bytes: int | None,
    nearby_budgets: Sequence[NearbyBudget] = (),
    tensors: Sequence[dict[str, object]] = (),
) -> str:
    """Write a plan and its account as one JSON object, for scripts.

    Args:
        plan: The plan, whether it fits or not.
        account: Its predicted peak.
        budget_bytes: The budget, None where none was given: then everything is feasible.
        minimum_bytes: The smallest budget that works, None where it was not looked for.
        nearby_budgets: The plans of budgets near this one; without any the key is left out.
        tensors: The largest tensors, as `tensor_view` gives them; the same.
    """
    content: dict[str, object] = {
        "schema": SCHEMA,
        "feasible": budget_bytes is None or account.peak_bytes <= budget_bytes,
        "budget_bytes": None if budget_bytes is None else int(budget_bytes),
        "predicted_peak_bytes": account.peak_bytes,
        "minimum_budget_bytes": None if minimum_bytes is None else int(minimum_bytes),
        "binding": account.binding,
        "breakdown": {term: account.breakdown[term] for term in BREAKDOWN},
        "memory_options": asdict(plan.memory_options),
        "levels": dict(plan.levels),
    }
    if account.devices > 1:
        content["devices"] = account.devices
    if nearby_budgets:
        content["nearby_budgets"] = [
            _nearby_budget_to_json(neighbour) for neighbour in nearby_budgets
        ]
    if tensors:
        content["tensors"] = list(tensors)
    return json.dumps(content, indent=2)


def level_grid(levels: Mapping[str, int]) -> tuple[_Grid, dict[str, int]]:
    """Sort levels by layer and role.

    Args:
        levels: By parameter name.

    Returns:
        The level by layer and role, and apart, by name, of what has no such place.
    """
    grid: _Grid = {}
    elsewhere: dict[str, int] = {}
    for name, level in levels.items():
        layer, role = layer_of(name), role_of(name)
        if layer is None or role not in ROLES:
            elsewhere[name] = level
        else:
            grid.setdefault(layer, {})[role] = level
    return grid, elsewhere


def level_rows(levels: Mapping[str, int]) -> list[list[str]]:
    """Give the grid as text, neighbouring layers that are equal as one row: "0-11".

    Args:
        levels: By parameter name.

    Returns:
        Rows of the layers and a cell per role; none if a single level says it all.
    """
    if len(set(levels.values())) < 2:
        return []
    grid, _ = level_grid(levels)
    rows = []
    for cells, run in groupby(
        sorted(grid), key=lambda layer: [str(grid[layer].get(role, "-")) for role in ROLES]
    ):
        layers = list(run)
        first, last = layers[0], layers[-1]
        rows.append([str(first) if first == last else f"{first}-{last}", *cells])
    return rows


def describe_levels(levels: Mapping[str, int]) -> list[str]:
    """Say in lines what the rows of `level_rows` do not.

    Args:
        levels: By parameter name.
    """
    if not levels:
        return ["No matrix folds."]
    if len(set(levels.values())) == 1:
        level = next(iter(levels.values()))
        meaning = f"{2**level} columns share their state" if level else "the state is Adam's"
        return [f"Every matrix at level {level}: {meaning}."]
    _, elsewhere = level_grid(levels)
    return [f"{name} at level {level}" for name, level in sorted(elsewhere.items())]


def option_changes(memory_options: MemoryOptions, others: MemoryOptions) -> list[str]:
    """Say what other memory options are, where they differ: ["micro-batch 1 x 8 accumulated"].

    Args:
        memory_options: What to compare with.
        others: What to name.
    """
    before, after = _options_in_words(memory_options), _options_in_words(others)
    return [f"{name} {value}" for name, value in after.items() if value != before[name]]


def _memory_table(account: Account) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    each = f", on each of {account.devices} devices" if account.devices > 1 else ""
    table.add_column(f"memory at the peak{each}")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    table.add_column("", width=_BAR_WIDTH)
    largest = max(account.breakdown.values())
    for term in BREAKDOWN:
        share = account.breakdown[term] / account.peak_bytes
        table.add_row(
            term.replace("_", " "),
            format_bytes(account.breakdown[term]),
            f"{share:.1%}",
            "#" * round(_BAR_WIDTH * account.breakdown[term] / largest),
        )
    table.add_section()
    table.add_row("predicted peak", format_bytes(account.peak_bytes), "100.0%", "")
    return table


def _verdict(account: Account, budget_bytes: int | None, minimum_bytes: int | None) -> list[str]:
    lines = []
    if budget_bytes is not None:
        left = budget_bytes - account.peak_bytes
        budget = format_bytes(budget_bytes)
        lines.append(
            f"Fits the budget of {budget}, with {format_bytes(left)} left."
            if left >= 0
            else f"Does not fit the budget of {budget}: {format_bytes(-left)} more are needed."
        )
    if minimum_bytes is not None:
        # Rounded up, so that it works.
        lines.append(f"The smallest budget that works is {at_least(minimum_bytes)}.")
    return lines


def _what_binds(plan: FoldPlan, account: Account, budget_bytes: int | None) -> list[str]:
    """Say what the memory goes to, and where it is short, what of it the user can change."""
    terms = account.breakdown
    largest, state = account.binding, terms["optimizer_state"]
    line = f"The largest term is {largest.replace('_', ' ')} ({format_bytes(terms[largest])})"
    if largest != "optimizer_state" and state:
        line += f"; levels change only the optimizer state ({format_bytes(state)})"
    memory_options, lines = plan.memory_options, [f"{line}."]
    is_short = budget_bytes is not None and account.peak_bytes > _NEARLY_ALL * budget_bytes
    if is_short and any(plan.levels.values()) and not memory_options.state_offload:
        # With gradient release a step is one micro-batch.
        setting = "batch_size" if memory_options.gradient_release else "micro_batch_size"
        size = memory_options.micro_batch_size
        smaller = f"data.{setting} (now {size}) or " if size > 1 else ""
        passing = format_bytes(terms["activations"] + terms["loss"])
        lines.append(
            f"Room for lower levels or fewer memory options: up to {passing} of activations and "
            "loss, by "
            f"a smaller {smaller}data.sequence_length; all terms, by a smaller model."
        )
    return lines


def _describe_nearby_budget(neighbour: NearbyBudget, plan: FoldPlan) -> str:
    direction = "more" if neighbour.percent > 0 else "less"
    start = (
        f"With {format_bytes(neighbour.budget_bytes)} ({abs(neighbour.percent)} % {direction}): "
    )
    if neighbour.plan is None:
        return f"{start}nothing fits."
    changes = option_changes(plan.memory_options, neighbour.plan.memory_options)
    mean, other = f"{mean_level(plan):.2f}", f"{mean_level(neighbour.plan):.2f}"
    if mean != other:
        changes.insert(0, f"mean level {other} instead of {mean}")
    return start + (", ".join(changes) or "nothing changes") + "."


def _nearby_budget_to_json(neighbour: NearbyBudget) -> dict[str, object]:
    plan = neighbour.plan
    return {
        "percent": neighbour.percent,
        "budget_bytes": neighbour.budget_bytes,
        "feasible": plan is not None,
        "predicted_peak_bytes": neighbour.peak_bytes,
        "mean_level": None if plan is None else mean_level(plan),
        "memory_options": None if plan is None else asdict(plan.memory_options),
    }


def _options_in_words(memory_options: MemoryOptions) -> dict[str, str]:
    checkpointing = _on_off(memory_options.activation_checkpointing)
    if memory_options.selective_checkpointing:
        checkpointing = "selective"
    return {
        "micro-batch": f"{memory_options.micro_batch_size} x "
        f"{memory_options.accumulate_grad_batches} accumulated",
        "chunked loss": _on_off(memory_options.chunked_loss),
        "activation checkpointing": checkpointing,
        "gradient release": _on_off(memory_options.gradient_release),
        "state": memory_options.state_dtype
        + (", in host memory" if memory_options.state_offload else ""),
    }


def _on_off(value: bool) -> str:
    return "on" if value else "off"

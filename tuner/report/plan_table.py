"""A plan as `plan` prints it: memory, memory options and fold levels, as a table or as JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from types import MappingProxyType

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foam_lightning.memory.account import Account
from foam_lightning.memory.inventory import TensorGroup
from foam_lightning.memory.timeline import TERMS
from foam_lightning.model.roles import layer_of, role_of, roles_of
from foam_lightning.plan import FoldPlan, MemoryOptions
from foam_lightning.units import at_least, format_bytes
from tuner.planning.planner import NearbyBudget, mean_level

SCHEMA = "foam-lightning/plan/3"
# The terms of an account in the order of the tables, and what people call them.
TERM_NAMES = {term: term.replace("_", " ") for term in (*TERMS, "context", "margin", "slack")} | {
    "loss": "logits and loss",
    "workspace": "temporary buffers",
    "context": "CUDA context",
    "margin": "allocator overhead",
    "slack": "kept free",
}

# The fields of `MemoryOptions` that share a row of the table.
_OPTION_ROWS = {
    "batch": ("accumulate_grad_batches",),
    "chunked loss": ("chunked_loss",),
    "activation checkpointing": ("activation_checkpointing", "selective_checkpointing"),
    "gradient release": ("gradient_release", "grad_offload"),
    "optimizer state": ("state_dtype", "state_offload"),
    "weights": ("weights_dtype",),
}
_MAX_BAR_WIDTH = 24
# Columns that a table needs: memory without its bars, options with their costs, tensors.
_MEMORY_WIDTH, _OPTIONS_WIDTH, _TENSORS_WIDTH = 46, 76, 72
# A plan that leaves more than a tenth of the budget is not short of memory.
_NEARLY_ALL = 0.9
_Grid = dict[int, dict[str, int]]


@dataclass(frozen=True)
class ByWidth:
    """A table whose layout depends on the width of the terminal."""

    build: Callable[[int], RenderableType]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.build(options.max_width)


def plan_table(
    plan: FoldPlan,
    account: Account,
    budget_bytes: int | None,
    minimum_bytes: int | None,
    nearby_budgets: Sequence[NearbyBudget] = (),
    option_costs: Mapping[str, str] = MappingProxyType({}),
    minimum_host_bytes: int = 0,
) -> Group:
    """Lay a plan out for the terminal: memory, memory options and levels.

    Args:
        plan: The plan.
        account: Its predicted peak.
        budget_bytes: The budget; None if there is none.
        minimum_bytes: The smallest budget that works; None if it is not known.
        nearby_budgets: The plans of slightly larger and smaller budgets.
        option_costs: The speed that the memory options in use cost, by field of `MemoryOptions`.
        minimum_host_bytes: The host memory that the smallest budget takes besides.
    """
    lines = [
        *_budget_in_words(account, budget_bytes, minimum_bytes, minimum_host_bytes),
        *_largest_term_in_words(plan, account, budget_bytes),
        *_allocator_in_words(account),
        *(_nearby_budget_in_words(nearby, plan) for nearby in nearby_budgets),
    ]
    parts: list[RenderableType] = [
        *([Text(f"\nMemory on each of {account.devices} devices:")] * (account.devices > 1)),
        ByWidth(lambda width: _memory_table(account, width)),
        *map(Text, lines),
        Text(),
        ByWidth(lambda width: _options_table(plan.memory_options, option_costs, width)),
        Text(),
    ]
    rows = level_rows(plan.levels)
    if rows:
        grid = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        grid.add_column("layers", no_wrap=True)
        for role in roles_of(plan.levels):
            grid.add_column(role, justify="right", no_wrap=True)
        for row in rows:
            grid.add_row(*row)
        parts += [Text("Fold level by layer and matrix:"), grid]
    parts += map(Text, describe_levels(plan.levels))
    return Group(*parts)


def plan_json(
    plan: FoldPlan,
    account: Account,
    budget_bytes: int | None,
    minimum_bytes: int | None,
    nearby_budgets: Sequence[NearbyBudget] = (),
    tensors: Sequence[dict[str, object]] = (),
    minimum_host_bytes: int = 0,
) -> str:
    """Write a plan and its account as one JSON object, for scripts.

    Args:
        plan: The plan, whether it fits or not.
        account: Its predicted peak.
        budget_bytes: The budget; None if there is none, and then every plan is feasible.
        minimum_bytes: The smallest budget that works; None if it is not known.
        nearby_budgets: The plans of slightly larger and smaller budgets; none leaves the key out.
        tensors: The largest tensors, from `tensors_as_json`; none leaves the key out.
        minimum_host_bytes: The host memory that the smallest budget takes besides; 0 leaves the key
            out.
    """
    content: dict[str, object] = {
        "schema": SCHEMA,
        "feasible": budget_bytes is None or account.peak_bytes <= budget_bytes,
        "budget_bytes": None if budget_bytes is None else int(budget_bytes),
        "predicted_peak_bytes": account.peak_bytes,
        "host_bytes": account.host_bytes,
        "minimum_budget_bytes": None if minimum_bytes is None else int(minimum_bytes),
        "binding": account.binding,
        "breakdown": {term: account.breakdown[term] for term in TERM_NAMES},
        "memory_options": asdict(plan.memory_options),
        "levels": dict(plan.levels),
    }
    if minimum_host_bytes:
        content["minimum_host_bytes"] = minimum_host_bytes
    if account.expandable_segments:
        content["expandable_segments"] = True
    if account.devices > 1:
        content["devices"] = account.devices
    if nearby_budgets:
        content["nearby_budgets"] = [_nearby_budget_as_json(nearby) for nearby in nearby_budgets]
    if tensors:
        content["tensors"] = list(tensors)
    return json.dumps(content, indent=2)


def tensor_table(holdings: Sequence[TensorGroup], max_rows: int) -> RenderableType:
    """Lay the largest tensors out for the terminal, and the rest as one row.

    Args:
        holdings: All tensors at the peak, largest first.
        max_rows: How many to show.
    """
    rows = []
    for holding in holdings[:max_rows]:
        origin = holding.origin
        shape = " x ".join(map(str, origin.shape)) or "scalar"
        kind = f"{TERM_NAMES[holding.term]}, {origin.phase}: {shape} {_dtype(holding)}"
        sizes = format_bytes(holding.num_bytes), f"{holding.count} x {format_bytes(holding.size)}"
        rows.append((*sizes, f"{origin.made_by}\n{kind}"))
    rest = holdings[max_rows:]
    if rest:
        num_bytes = sum(holding.num_bytes for holding in rest)
        rows.append((format_bytes(num_bytes), "", f"{len(rest)} more kinds of tensor"))

    def build(width: int) -> RenderableType:
        if width < _TENSORS_WIDTH:
            lines = (f"{total}  {each}\n{kind}" for total, each, kind in rows)
            return Group("\nlargest tensors", *map(Text, lines))
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("largest tensors", justify="right", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("made by", overflow="fold")
        for row in rows:
            table.add_row(*row)
        return table

    return ByWidth(build)


def tensors_as_json(holdings: Sequence[TensorGroup], max_tensors: int) -> list[dict[str, object]]:
    """Give the largest tensors as `plan_json` takes them.

    Args:
        holdings: All tensors at the peak, largest first.
        max_tensors: How many to give.
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
        for holding in holdings[:max_tensors]
    ]


def _dtype(holding: TensorGroup) -> str:
    return str(holding.origin.dtype).removeprefix("torch.")


def level_grid(levels: Mapping[str, int]) -> tuple[_Grid, dict[str, int]]:
    """Sort levels by layer and role.

    Args:
        levels: By parameter name.

    Returns:
        The levels by layer and role, and by name those of parameters outside the layers.
    """
    grid: _Grid = {}
    elsewhere: dict[str, int] = {}
    for name, level in levels.items():
        layer, role = layer_of(name), role_of(name)
        if layer is None or role == "other":
            elsewhere[name] = level
        else:
            grid.setdefault(layer, {})[role] = level
    return grid, elsewhere


def level_rows(levels: Mapping[str, int]) -> list[list[str]]:
    """Give the grid as text; consecutive layers with equal levels share a row, "0-11".

    Args:
        levels: By parameter name.

    Returns:
        Rows of the layers and a cell for each of `roles_of(levels)`; none if all levels are equal.
    """
    if len(set(levels.values())) < 2:
        return []
    grid, _ = level_grid(levels)
    roles = roles_of(levels)
    rows = []
    for cells, run in groupby(
        sorted(grid), key=lambda layer: [str(grid[layer].get(role, "-")) for role in roles]
    ):
        layers = list(run)
        first, last = layers[0], layers[-1]
        rows.append([str(first) if first == last else f"{first}-{last}", *cells])
    return rows


def describe_levels(levels: Mapping[str, int]) -> list[str]:
    """Describe in lines the levels that `level_rows` leaves out.

    Args:
        levels: By parameter name.
    """
    if not levels:
        return ["The model has no matrix to fold."]
    if len(set(levels.values())) == 1:
        level = next(iter(levels.values()))
        meaning = f"{2**level} columns share one optimizer state" if level else "Adam"
        return [f"Every matrix at level {level}: {meaning}."]
    _, elsewhere = level_grid(levels)
    return [f"{name} at level {level}" for name, level in sorted(elsewhere.items())]


def option_changes(memory_options: MemoryOptions, others: MemoryOptions) -> list[str]:
    """Describe the memory options that differ: ["activation checkpointing on"].

    Args:
        memory_options: What to compare with.
        others: What to describe.
    """
    before, after = _options_in_words(memory_options), _options_in_words(others)
    return [f"{name} {value}" for name, value in after.items() if value != before.get(name)]


def _memory_table(account: Account, width: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("memory at the peak")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    bar_width = min(_MAX_BAR_WIDTH, width - _MEMORY_WIDTH)
    largest = max(account.breakdown.values())
    if bar_width > 0:
        table.add_column("", width=bar_width)
    for term, name in TERM_NAMES.items():
        num_bytes = account.breakdown[term]
        row = [name, format_bytes(num_bytes), f"{num_bytes / account.peak_bytes:.1%}"]
        table.add_row(*row, *(["#" * round(bar_width * num_bytes / largest)] * (bar_width > 0)))
    table.add_section()
    table.add_row("predicted peak", format_bytes(account.peak_bytes), "100.0%")
    if account.host_bytes:
        table.add_row("host memory", format_bytes(account.host_bytes))
    return table


def _options_table(
    memory_options: MemoryOptions, option_costs: Mapping[str, str], width: int
) -> RenderableType:
    """Lay out each option with its value and cost; a narrow terminal gets a line for each cost."""
    table = Table.grid(padding=(0, 2))
    lines: list[RenderableType] = []
    for name, value in _options_in_words(memory_options).items():
        costs = [option_costs[field] for field in _OPTION_ROWS[name] if field in option_costs]
        table.add_row(name, value, "; ".join(costs))
        lines += [Text(f"{name}: {value}"), *(Padding(cost, (0, 0, 0, 2)) for cost in costs)]
    return table if width >= _OPTIONS_WIDTH else Group(*lines)


def _budget_in_words(
    account: Account, budget_bytes: int | None, minimum_bytes: int | None, minimum_host_bytes: int
) -> list[str]:
    lines = []
    if budget_bytes is not None:
        left = budget_bytes - account.peak_bytes
        budget = format_bytes(budget_bytes)
        lines.append(
            f"Fits the budget of {budget} with {format_bytes(left)} to spare."
            if left >= 0
            else f"Does not fit the budget of {budget}: it needs {format_bytes(-left)} more."
        )
    if minimum_bytes is not None:
        # Rounded up, so that it works.
        host = f", with {format_bytes(minimum_host_bytes)} of host memory"
        minimum = at_least(minimum_bytes) + (host if minimum_host_bytes else "")
        lines.append(f"The smallest budget that works is {minimum}.")
    return lines


def _largest_term_in_words(plan: FoldPlan, account: Account, budget_bytes: int | None) -> list[str]:
    """Say what takes most memory, and where it is short, which settings free some."""
    terms, options = account.breakdown, plan.memory_options
    largest, state = account.binding, terms["optimizer_state"]
    line = f"Most memory goes to {TERM_NAMES[largest]} ({format_bytes(terms[largest])})"
    if largest != "optimizer_state" and state:
        line += f"; fold levels change only the optimizer state ({format_bytes(state)})"
    lines = [f"{line}."]
    is_short = budget_bytes is not None and account.peak_bytes > _NEARLY_ALL * budget_bytes
    if is_short and any(plan.levels.values()) and not options.state_offload:
        # Where backward updates, a step is one micro-batch.
        setting = "batch_size" if options.updates_in_backward else "micro_batch_size"
        size = options.micro_batch_size
        smaller = f"data.{setting} (now {size}) or " if size > 1 else ""
        freed = format_bytes(terms["activations"] + terms["loss"])
        lines.append(
            f"To fold less, free memory: lower {smaller}data.sequence_length (up to {freed}), "
            "or use a smaller model."
        )
    return lines


def _allocator_in_words(account: Account) -> list[str]:
    """Say for which kind of the allocator's segments its overhead is, where there is one."""
    if not account.breakdown["margin"]:
        return []
    kind = "expandable" if account.expandable_segments else "fixed"
    return [f"The allocator overhead is that of {kind} segments (PYTORCH_ALLOC_CONF)."]


def _nearby_budget_in_words(nearby: NearbyBudget, plan: FoldPlan) -> str:
    start = f"With {format_bytes(nearby.budget_bytes)} ({nearby.percent:+d} %): "
    if nearby.plan is None:
        return f"{start}nothing fits."
    changes = option_changes(plan.memory_options, nearby.plan.memory_options)
    mean, other = f"{mean_level(plan):.2f}", f"{mean_level(nearby.plan):.2f}"
    if mean != other:
        changes.insert(0, f"mean level {other} instead of {mean}")
    return start + ("; ".join(changes) or "no change") + "."


def _nearby_budget_as_json(nearby: NearbyBudget) -> dict[str, object]:
    plan = nearby.plan
    return {
        "percent": nearby.percent,
        "budget_bytes": nearby.budget_bytes,
        "feasible": plan is not None,
        "predicted_peak_bytes": nearby.peak_bytes,
        "host_bytes": nearby.host_bytes,
        "mean_level": None if plan is None else mean_level(plan),
        "memory_options": None if plan is None else asdict(plan.memory_options),
    }


def _options_in_words(options: MemoryOptions) -> dict[str, str]:
    num_parts = options.accumulate_grad_batches
    in_parts = f" as {num_parts} micro-batches of {options.micro_batch_size}"
    checkpointing = _on_off(options.activation_checkpointing)
    return {
        "batch": f"{options.batch_size}{in_parts if num_parts > 1 else ', no accumulation'}",
        "chunked loss": _on_off(options.chunked_loss),
        "activation checkpointing": (
            "selective" if options.selective_checkpointing else checkpointing
        ),
        "gradient release": _on_off(options.gradient_release)
        + (", summed in host memory" if options.grad_offload else ""),
        "optimizer state": options.state_dtype
        + (" in host memory" if options.state_offload else ""),
        **({"weights": "matrices in int8"} if options.weights_dtype == "int8" else {}),
    }


def _on_off(value: bool) -> str:
    return "on" if value else "off"

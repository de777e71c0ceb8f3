"""The verdict: what the plan gains or loses in loss, and what the saved memory is good for."""

import math
from dataclasses import dataclass
from functools import partial

from foam_lightning.plan import MemoryOptions
from foam_lightning.units import at_least, format_bytes
from tuner.planning.planner import BudgetPlanner
from tuner.report.ablation import at_equal_bytes
from tuner.report.plan_table import option_changes
from tuner.trials.extrapolation import predict_full_run
from tuner.trials.results import Candidate, SearchResult
from tuner.trials.runner import Difference

# The reference: AdamW whose matrices train at scale times lr, like FOAM's.
_ADAM = "Adam (split learning rate)"


@dataclass(frozen=True)
class AdamRequirement:
    """What training with Adam (level 0 everywhere) would take.

    Attributes:
        memory_options: The cheapest with which Adam fits the budget; None if it fits with none.
        minimum_bytes: The smallest budget that Adam fits; None if it fits this one.
    """

    memory_options: MemoryOptions | None
    minimum_bytes: int | None = None


def adam_requirement(planner: BudgetPlanner) -> AdamRequirement:
    """Find what Adam would need.

    Args:
        planner: The plans that fit the budget.
    """
    if planner.adam_may_win:
        return AdamRequirement(planner.memory_options)
    found = planner.ladder.find_fastest(
        lambda memory_options, _: planner.fits(planner.module.uniform_plan(0, memory_options))
    )
    if found is not None:
        return AdamRequirement(found)
    return AdamRequirement(None, planner.minimum_at(0).account.peak_bytes)


def verdict(search_result: SearchResult, adam: AdamRequirement, full_steps: int) -> str:
    """Sum up a search; a difference is only claimed where its interval excludes zero.

    Args:
        search_result: What was run.
        adam: What Adam would need.
        full_steps: Optimizer steps of the full run.

    Returns:
        One sentence a line: the plan's validation loss against Adam and at equal bytes, its
        optimizer state, what Adam would need, and, if the full run is longer than the finals, the
        differences to expect there.
    """
    winner, steps = search_result.winner, search_result.budget.final_steps
    if not math.isfinite(winner.loss):
        return "Every run of the finals diverged; lower model.lr and run again."
    runs = f"95 % intervals, runs of {steps} steps"
    if winner.plan.proxy_model:
        runs += f" on a proxy model of hidden size {winner.plan.proxy_model['hidden_size']}"
    if winner.kind == "reference":
        return "\n".join(_adam_won(search_result, runs))
    others = _compared_with(search_result)
    lines = []
    if others:
        compared = " and ".join(_compare(winner.against(c), name) for c, name in others)
        lines.append(f"Validation loss: {compared} ({runs}).")
    if search_result.reference is None:
        was_run = any(trial.level == 0 for trial in search_result.trials)
        reason = "every run of it diverged" if was_run else "neither it nor a proxy model fits"
        lines.append(f"Not compared with Adam: {reason}.")
    lines.append(f"Plan: {winner.label}, {_state(winner, search_result)}.")
    lines.append(_adam_in_words(adam, winner.plan.memory_options))
    if full_steps > steps and others:
        predict = partial(predict_full_run, num_steps=steps, full_steps=full_steps)
        expected = " and ".join(_compare(winner.expected(c, predict), name) for c, name in others)
        lines.append(
            f"Expected on the full run, {full_steps / steps:.3g} times as long: {expected}."
        )
    return "\n".join(lines)


def _adam_won(search_result: SearchResult, runs: str) -> list[str]:
    """Say why Adam stays, and what the folded plan with the least state would cost."""
    adam = search_result.winner
    lines = [f"Plan: {_ADAM}; it fits, and no folded plan is significantly better ({runs})."]
    folded = [c for c in search_result.finalists if c.kind != "reference" and math.isfinite(c.loss)]
    if folded:
        tied = [c for c in folded if not c.against(adam).is_decided]
        closest = min(tied, key=lambda c: c.state_bytes, default=min(folded, key=lambda c: c.loss))
        lines.append(
            f"Closest folded plan: {closest.label}, {_state(closest, search_result)}; "
            f"validation loss {_compare(closest.against(adam), 'Adam')}."
        )
    return lines


def _compared_with(search_result: SearchResult) -> list[tuple[Candidate, str]]:
    """List what a folded winner is compared with: Adam, and the other kind at equal bytes."""
    winner, adam = search_result.winner, search_result.reference
    kind = "uniform" if winner.kind == "mixed" else "mixed"
    others = [c for c in search_result.finalists if c.kind == kind and math.isfinite(c.loss)]
    equal = at_equal_bytes(winner.state_bytes, others)
    best = sorted(equal, key=lambda c: c.loss)[:1]
    return [
        *([(adam, _ADAM)] if adam else []),
        *((c, f"{c.label} at equal bytes") for c in best),
    ]


def _compare(difference: Difference, other: str) -> str:
    if not difference.is_decided:
        return f"no significant difference to {other} ({difference} nats)"
    direction = "higher" if difference.mean > 0 else "lower"
    return f"{difference.size} nats {direction} than {other}"


def _state(candidate: Candidate, search_result: SearchResult) -> str:
    adam_bytes = search_result.adam_state_bytes
    saved = format_bytes(adam_bytes - candidate.state_bytes)
    percent = 100 * candidate.state_bytes / adam_bytes
    return f"{percent:.3g} % of Adam's optimizer state for the matrices ({saved} less)"


def _adam_in_words(adam: AdamRequirement, memory_options: MemoryOptions) -> str:
    if adam.memory_options is None:
        assert adam.minimum_bytes is not None
        minimum = at_least(adam.minimum_bytes)
        return (
            f"Adam does not fit this budget with any memory options; it needs at least {minimum}."
        )
    changes = option_changes(memory_options, adam.memory_options)
    if not changes:
        return "Adam also fits this budget; the saved memory is unused."
    return f"Adam would fit this budget only with {'; '.join(changes)}."

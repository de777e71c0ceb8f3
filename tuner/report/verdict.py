"""The verdict: what a plan gains or loses, and what the memory it frees bought, in a few words."""

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

_UNIT = "in nats per token with 95 % intervals"


@dataclass(frozen=True)
class AdamRequirement:
    """What it would take to train with Adam, which is level 0 everywhere.

    Attributes:
        memory_options: The cheapest with which it fits the budget; None where it fits with none.
        least_bytes: The smallest budget that it fits, where it does not fit this one.
    """

    memory_options: MemoryOptions | None
    least_bytes: int | None = None


def adam_requirement(planner: BudgetPlanner) -> AdamRequirement:
    """Find what Adam would need.

    Args:
        planner: The plans that fit the budget.
    """
    if planner.adam_may_win:
        return AdamRequirement(planner.memory_options)
    found = planner.ladder.cheapest(
        lambda memory_options, _: planner.fits(planner.module.uniform_plan(0, memory_options))
    )
    if found is not None:
        return AdamRequirement(found)
    return AdamRequirement(None, planner.least(0).account.peak_bytes)


def verdict(search_result: SearchResult, need: AdamRequirement, full_steps: int) -> str:
    """Say what was found; nothing is claimed that its interval leaves undecided.

    Args:
        search_result: What was run.
        need: What Adam would need.
        full_steps: Optimizer steps of the full run.

    Returns:
        One line: the plan against Adam and at equal bytes, what the saved memory bought, and, where
        the full run is longer than the finals, what becomes of the gaps.
    """
    winner = search_result.winner
    if not math.isfinite(winner.loss):
        return "Every run of the finals diverged, so nothing was found; lower model.lr."
    steps = search_result.budget.final_steps
    judge = _kept if winner.kind == "reference" else _folded
    sentences = [f"{judge(search_result, f'in runs of {steps} steps')}."]
    if winner.kind != "reference":
        sentences.append(_bought(need, winner.plan.memory_options))
    if full_steps > steps and winner.kind != "reference" and _rivals(search_result):
        predict = partial(predict_full_run, num_steps=steps, full_steps=full_steps)
        gaps = [
            f"{winner.expected(c, predict)} against {label}" for c, label in _rivals(search_result)
        ]
        sentences.append(
            f"On the full run, {full_steps / steps:.3g} times as long, expect "
            f"{' and '.join(gaps)}; the choice rests on that."
        )
    return " ".join(sentences)


def _folded(search_result: SearchResult, where: str) -> str:
    """Judge a winner that folds, against Adam and against the other kind at equal bytes."""
    winner, proxy_model = search_result.winner, search_result.winner.plan.proxy_model
    saved = format_bytes(search_result.adam_state_bytes - winner.state_bytes)
    judged = [_judged(winner.against(c), label) for c, label in _rivals(search_result)]
    said = " and ".join(judged)
    if said.startswith("loses"):
        said = said.replace(" and loses ", " and ")
    said = f"{said}, {_UNIT}" if said else ""
    if search_result.reference is None:
        no_adam = "was not compared with Adam, of which no run came to its end"
        said = f"{no_adam}; it {said}" if said else no_adam
    if proxy_model:
        where = f"on a proxy model of hidden {proxy_model['hidden_size']}, {where}"
    return (
        f"{where[0].upper()}{where[1:]}, at {_share(winner, search_result)} ({saved} saved), "
        f"{winner.label} {said}"
    )


def _kept(search_result: SearchResult, where: str) -> str:
    """Judge what came nearest to Adam, where Adam won."""
    winner = search_result.winner
    folded = [c for c in search_result.finalists if c.kind != "reference" and math.isfinite(c.loss)]
    said = f"{winner.label} stays: it fits, and {where} nothing with less state is better for sure"
    if not folded:
        return said
    tied = [c for c in folded if not c.against(winner).is_decided]
    nearest = min(tied, key=lambda c: c.state_bytes) if tied else min(folded, key=lambda c: c.loss)
    return (
        f"{said}; at {_share(nearest, search_result)}, {nearest.label} "
        f"{_judged(nearest.against(winner), 'it')}, {_UNIT}"
    )


def _rivals(search_result: SearchResult) -> list[tuple[Candidate, str]]:
    """List what a winner that folds is judged against: Adam, and one plan at equal bytes."""
    winner = search_result.winner
    kind = "uniform" if winner.kind == "mixed" else "mixed"
    others = [c for c in search_result.finalists if c.kind == kind and math.isfinite(c.loss)]
    equal = min(at_equal_bytes(winner.state_bytes, others), key=lambda c: c.loss, default=None)
    found = (
        []
        if search_result.reference is None
        else [(search_result.reference, search_result.reference.label)]
    )
    return found if equal is None else [*found, (equal, f"{equal.label} at equal bytes")]


def _judged(difference: Difference, other: str) -> str:
    if not difference.is_decided:
        return f"cannot be told from {other} ({difference})"
    direction = "more" if difference.mean > 0 else "less"
    size = f"{abs(difference.mean):.4f} +- {difference.half_width:.4f}"
    return f"loses {size} {direction} than {other}"


def _share(candidate: Candidate, search_result: SearchResult) -> str:
    percent = 100 * candidate.state_bytes / search_result.adam_state_bytes
    return f"{percent:.3g} % of Adam's state of the matrices"


def _bought(need: AdamRequirement, memory_options: MemoryOptions) -> str:
    if need.memory_options is None:
        assert need.least_bytes is not None
        least = at_least(need.least_bytes)
        return (
            f"Adam does not fit the budget, whatever the memory options: it takes {least} or more."
        )
    changes = option_changes(memory_options, need.memory_options)
    if not changes:
        return "Adam fits the budget with the same memory options, so what is saved stays free."
    return f"Adam would fit the budget only with {', '.join(changes)}."

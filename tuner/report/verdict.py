"""The verdict: what a plan gains or loses, and what the memory it frees bought, in a few words."""

import math
from dataclasses import dataclass
from functools import partial

from foam_lightning.plan import Levers
from foam_lightning.units import at_least, in_words
from tuner.planning.planner import Fitting
from tuner.report.ablation import at_equal_bytes
from tuner.report.plan_table import lever_changes
from tuner.search.finals import Candidate
from tuner.trials.extrapolation import predicted
from tuner.trials.results import Outcome
from tuner.trials.runner import Difference

_UNIT = "in nats per token with 95 % intervals"


@dataclass(frozen=True)
class AdamsNeed:
    """What it would take to train with Adam, which is level 0 everywhere.

    Attributes:
        levers: The cheapest with which it fits the budget; None where it fits with none.
        least_bytes: The smallest budget that it fits, where it does not fit this one.
    """

    levers: Levers | None
    least_bytes: int | None = None


def adams_need(fitting: Fitting) -> AdamsNeed:
    """Find what Adam would need.

    Args:
        fitting: The plans that fit the budget.
    """
    if fitting.adam_fits:
        return AdamsNeed(fitting.levers)
    found = fitting.ladder.cheapest(
        lambda levers, _: fitting.fits(fitting.module.uniform_plan(0, levers))
    )
    if found is not None:
        return AdamsNeed(found)
    return AdamsNeed(None, fitting.least(0).account.peak_bytes)


def verdict(outcome: Outcome, need: AdamsNeed, full_steps: int) -> str:
    """Say what was found; nothing is claimed that its interval leaves undecided.

    Args:
        outcome: What was run.
        need: What Adam would need.
        full_steps: Optimizer steps of the full run.

    Returns:
        One line: the plan against Adam and at equal bytes, what the saved memory bought, and, where
        the full run is longer than the finals, what becomes of the gaps.
    """
    winner = outcome.winner
    if not math.isfinite(winner.loss):
        return "Every run of the finals diverged, so nothing was found; lower model.lr."
    steps = outcome.effort.final_steps
    judge = _kept if winner.kind == "reference" else _folded
    sentences = [f"{judge(outcome, f'in runs of {steps} steps')}."]
    if winner.kind != "reference":
        sentences.append(_bought(need, winner.plan.levers))
    if full_steps > steps and winner.kind != "reference" and _rivals(outcome):
        predict = partial(predicted, num_steps=steps, full_steps=full_steps)
        gaps = [f"{winner.expected(c, predict)} against {label}" for c, label in _rivals(outcome)]
        sentences.append(
            f"On the full run, {full_steps / steps:.3g} times as long, expect "
            f"{' and '.join(gaps)}; the choice rests on that."
        )
    return " ".join(sentences)


def _folded(outcome: Outcome, where: str) -> str:
    """Judge a winner that folds, against Adam and against the other kind at equal bytes."""
    winner, twin = outcome.winner, outcome.winner.plan.twin
    saved = in_words(outcome.adam_state_bytes - winner.state_bytes)
    judged = [_judged(winner.against(c), label) for c, label in _rivals(outcome)]
    said = " and ".join(judged)
    if said.startswith("loses"):
        said = said.replace(" and loses ", " and ")
    said = f"{said}, {_UNIT}" if said else ""
    if outcome.reference is None:
        no_adam = "was not compared with Adam, of which no run came to its end"
        said = f"{no_adam}; it {said}" if said else no_adam
    if twin:
        where = f"on a twin of hidden {twin['hidden_size']}, {where}"
    return (
        f"{where[0].upper()}{where[1:]}, at {_share(winner, outcome)} ({saved} saved), "
        f"{winner.label} {said}"
    )


def _kept(outcome: Outcome, where: str) -> str:
    """Judge what came nearest to Adam, where Adam won."""
    winner = outcome.winner
    folded = [c for c in outcome.finalists if c.kind != "reference" and math.isfinite(c.loss)]
    said = f"{winner.label} stays: it fits, and {where} nothing with less state is better for sure"
    if not folded:
        return said
    tied = [c for c in folded if not c.against(winner).is_decided]
    nearest = min(tied, key=lambda c: c.state_bytes) if tied else min(folded, key=lambda c: c.loss)
    return (
        f"{said}; at {_share(nearest, outcome)}, {nearest.label} "
        f"{_judged(nearest.against(winner), 'it')}, {_UNIT}"
    )


def _rivals(outcome: Outcome) -> list[tuple[Candidate, str]]:
    """List what a winner that folds is judged against: Adam, and one plan at equal bytes."""
    winner = outcome.winner
    kind = "uniform" if winner.kind == "mixed" else "mixed"
    others = [c for c in outcome.finalists if c.kind == kind and math.isfinite(c.loss)]
    equal = min(at_equal_bytes(winner.state_bytes, others), key=lambda c: c.loss, default=None)
    found = [] if outcome.reference is None else [(outcome.reference, outcome.reference.label)]
    return found if equal is None else [*found, (equal, f"{equal.label} at equal bytes")]


def _judged(difference: Difference, other: str) -> str:
    if not difference.is_decided:
        return f"cannot be told from {other} ({difference})"
    direction = "more" if difference.mean > 0 else "less"
    size = f"{abs(difference.mean):.4f} +- {difference.half_width:.4f}"
    return f"loses {size} {direction} than {other}"


def _share(candidate: Candidate, outcome: Outcome) -> str:
    percent = 100 * candidate.state_bytes / outcome.adam_state_bytes
    return f"{percent:.3g} % of Adam's state of the matrices"


def _bought(need: AdamsNeed, levers: Levers) -> str:
    if need.levers is None:
        assert need.least_bytes is not None
        least = at_least(need.least_bytes)
        return f"Adam does not fit the budget, whatever the levers: it takes {least} or more."
    changes = lever_changes(levers, need.levers)
    if not changes:
        return "Adam fits the budget with the same levers, so what is saved stays free."
    return f"Adam would fit the budget only with {', '.join(changes)}."

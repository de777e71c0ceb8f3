"""The report of a search, `report.md`: the verdict, the runs it rests on, and the chosen plan."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from foam_lightning.memory.account import Account
from foam_lightning.model.roles import roles_of
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.atomic import write_text
from foam_lightning.units import format_bytes
from tuner.planning.scales import describe_scales, scale_rows
from tuner.report.ablation import Ablation, ablations
from tuner.report.markdown import markdown_table
from tuner.report.plan_plots import draw_plan
from tuner.report.plan_table import TERM_NAMES, describe_levels, level_grid, level_rows
from tuner.report.result_plots import draw_ablation, draw_curves, draw_losses
from tuner.report.style import save
from tuner.trials.results import Candidate, SearchResult
from tuner.trials.runner import SEED_DEVIATION, Difference


def write_report(
    folder: Path,
    search_result: SearchResult,
    verdict: str,
    account: Account,
    adam_account: Account | None,
    budget_bytes: int,
) -> dict[str, Path]:
    """Write `report.md` and its plots; the same search result gives the same files.

    Args:
        folder: Where to; it exists.
        search_result: What tuning found.
        verdict: The result in a few sentences, to begin with.
        account: The predicted peak of the chosen plan.
        adam_account: The predicted peak of Adam with the same memory options, whether it fits or
            not; None leaves it out.
        budget_bytes: The budget.

    Returns:
        The plots by name: "losses" and "plan", and where there is something to show, "curves" and
        "ablation".
    """
    winner = search_result.winner
    accounts = {f"{winner.label},\nchosen": account}
    if adam_account is not None and winner.kind != "reference":
        accounts = {"Adam, same\nmemory options": adam_account, **accounts}
    grid, _ = level_grid(winner.plan.levels)
    found = ablations(search_result)
    figures: dict[str, Figure | None] = {
        "losses": draw_losses(search_result),
        "curves": draw_curves(search_result),
        "ablation": draw_ablation(found),
        "plan": draw_plan(accounts, budget_bytes, grid),
    }
    paths = {}
    for name, figure in figures.items():
        if figure is not None:
            paths[name] = folder / f"{name}.png"
            save(figure, paths[name])
    reason = search_result.reason
    sections = [
        f"# Tuning report\n\n{verdict}\n\n{reason[0].upper()}{reason[1:]}.",
        *_finals_section(search_result),
        *(_curves_section(search_result.baseline) if "curves" in paths else []),
        *(_ablation_section(found) if "ablation" in paths else []),
        *_trials_section(search_result),
        *_levels_section(winner),
        *_scales_section(winner),
        *_memory_section(accounts, budget_bytes),
    ]
    write_text(folder / "report.md", "\n\n".join(sections) + "\n")
    return paths


# ---- the sections of the report


def _finals_section(search_result: SearchResult) -> list[str]:
    winner, baseline = search_result.winner, search_result.baseline
    compared_with = [winner] if winner is baseline else [winner, baseline]
    rows = []
    for candidate in sorted(search_result.finalists, key=lambda c: _finite_or_last(c.loss)):
        rows.append(
            [
                f"**{candidate.label}**" if candidate is winner else candidate.label,
                _state_in_words(candidate.state_bytes, search_result.adam_state_bytes),
                str(len(candidate.runs)),
                _loss_in_words(candidate.loss),
                *(
                    "-" if candidate is other else _difference_in_words(candidate.against(other))
                    for other in compared_with
                ),
                f"{candidate.plan.lr:g}",
                describe_scales(candidate.plan),
            ]
        )
    run = winner.runs[0]
    columns = [
        f"vs. {'the chosen plan' if other is winner else other.label}" for other in compared_with
    ]
    return [
        f"## Finals\n\nRuns of {search_result.budget.final_steps} steps on seeds that the search "
        f"did not use, evaluated on {sum(run.num_tokens)} tokens in {len(run.num_tokens)} batches. "
        "The chosen plan is in bold.",
        markdown_table(
            ["plan", "optimizer state", "seeds", "validation loss", *columns, "lr", "scales"], rows
        ),
        "Optimizer state is that of the matrices that FOAM folds. Losses are in nats per token. "
        "Differences are paired (same initial weights, same batches, seeds that both ran on); "
        "above zero, the plan of the row is worse. The 95 % interval covers the spread over "
        f"evaluation batches and a fixed standard deviation of {SEED_DEVIATION:g} nats between "
        "seeds. The learning rate is that of the full run; shorter runs use one corrected for "
        "their length. Split-lr Adam is AdamW whose matrices train at scale times lr, like FOAM.",
        "![Validation loss against optimizer state](losses.png)",
    ]


def _curves_section(baseline: Candidate) -> list[str]:
    return [
        f"## Training curves\n\nTraining loss of each finalist minus that of {baseline.label} on "
        "the same batches, averaged over windows of steps. Below zero, the finalist is better; "
        "where the 95 % band includes zero, the difference may be noise. The choice of the plan "
        "rests on the validation loss above.",
        "![Training loss relative to the baseline](curves.png)",
    ]


def _ablation_section(found: Sequence[Ablation]) -> list[str]:
    rows = [
        [
            ablation.choice,
            ablation.chosen + (f" (best of {ablation.num_tried})" * (ablation.num_tried > 1)),
            ablation.baseline,
            f"{ablation.steps} x {ablation.num_seeds}",
            _difference_in_words(ablation.difference),
        ]
        for ablation in found
    ]
    return [
        "## Effect of each choice\n\nPairs of runs that differ in one choice; below zero, the "
        "choice helped. The best of several short runs was picked by the losses compared here, "
        "which favours it; the finals ran on other seeds.",
        markdown_table(["choice", "with it", "without it", "steps x seeds", "difference"], rows),
        "![Effect of each choice](ablation.png)",
    ]


def _trials_section(search_result: SearchResult) -> list[str]:
    rows = [
        [
            trial.description,
            trial.stage,
            "mixed" if trial.level is None else str(trial.level),
            _state_in_words(trial.state_bytes, search_result.adam_state_bytes),
            _loss_in_words(trial.loss),
        ]
        for trial in search_result.trials
    ]
    return [
        f"## Short runs\n\nRuns of {search_result.budget.steps} steps on one seed, each with a "
        f"complete schedule.{_proxy_scales(search_result.winner.plan)}",
        markdown_table(["run", "stage", "level", "optimizer state", "validation loss"], rows),
    ]


def _proxy_scales(plan: FoldPlan) -> str:
    if plan.proxy_model is None:
        return ""
    ratio = plan.model["hidden_size"] / plan.proxy_model["hidden_size"]
    return (
        f" They ran on the proxy model, whose scales are {ratio:.3g} times those at full width. "
        "This table has the scales of the proxy model, the rest of the report those at full width."
    )


def _levels_section(winner: Candidate) -> list[str]:
    levels = winner.plan.levels
    rows = level_rows(levels)
    return [
        "## Fold levels of the chosen plan",
        *([markdown_table(["layers", *roles_of(levels)], rows)] if rows else []),
        *describe_levels(levels),
    ]


def _scales_section(winner: Candidate) -> list[str]:
    rows = scale_rows(winner.plan)
    return [
        "## Scales of the chosen plan\n\nThe learning rate of a matrix is its scale times "
        f"{winner.plan.lr:g} (the peak); all other parameters use {winner.plan.lr:g} itself.",
        markdown_table(["level", *roles_of(winner.plan.scales)], rows)
        if rows
        else f"Every matrix at scale {describe_scales(winner.plan)}.",
    ]


def _memory_section(accounts: Mapping[str, Account], budget_bytes: int) -> list[str]:
    rows = [
        [name, *(format_bytes(account.breakdown[term]) for account in accounts.values())]
        for term, name in TERM_NAMES.items()
    ]
    peaks = [f"**{format_bytes(account.peak_bytes)}**" for account in accounts.values()]
    labels = [label.replace("\n", " ") for label in accounts]
    return [
        "## Memory\n\nPredicted for each device, at the moment of the peak; the budget is "
        f"{format_bytes(budget_bytes)}.",
        markdown_table(["term", *labels], [*rows, ["**peak**", *peaks]]),
        "![Memory and fold levels of the chosen plan](plan.png)",
    ]


def _state_in_words(num_bytes: int, adam_bytes: int) -> str:
    return f"{format_bytes(num_bytes)} ({num_bytes / adam_bytes:.1%} of Adam's)"


def _finite_or_last(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _loss_in_words(loss: float | None) -> str:
    return "diverged" if loss is None or not math.isfinite(loss) else f"{loss:.4f}"


def _difference_in_words(difference: Difference) -> str:
    if math.isnan(difference.mean):
        return "diverged"
    return f"{difference}" + ("" if difference.is_decided else " (not significant)")

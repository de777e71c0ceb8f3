"""The report of a search: what it came to, what was run, and what the winner costs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from foam_lightning.memory.account import Account
from foam_lightning.model.roles import ROLES
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.atomic import write_text
from foam_lightning.units import format_bytes
from tuner.planning.scales import describe_scales, scale_rows
from tuner.report.ablation import Ablation, ablations
from tuner.report.plan_plots import draw_levels, draw_memory
from tuner.report.plan_table import BREAKDOWN, describe_levels, level_grid, level_rows
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
    """Write `report.md` and its pictures; equal outcomes give equal files.

    Args:
        folder: Exists already.
        search_result: What tuning found.
        verdict: What it comes to, in one line, to begin with.
        account: The predicted peak of the winner.
        adam_account: That of level 0 everywhere with the same memory options, whether it fits or
            not.
        budget_bytes: The budget.

    Returns:
        The pictures by name: "losses", "levels" and "memory", and where there is something to
        show, "curves" and "worth".
    """
    winner = search_result.winner
    accounts = {f"winner: {winner.label}": account}
    if adam_account is not None and winner.kind != "reference":
        accounts = {"Adam (level 0)": adam_account, **accounts}
    grid, _ = level_grid(winner.plan.levels)
    found = ablations(search_result)
    drawn: dict[str, Figure | None] = {
        "losses": draw_losses(search_result),
        "curves": draw_curves(search_result),
        "worth": draw_ablation(found),
        "levels": draw_levels(grid, f"Fold levels of the winner: {winner.label}"),
        "memory": draw_memory(accounts, budget_bytes),
    }
    paths = {name: folder / f"{name}.png" for name, picture in drawn.items() if picture}
    for name, path in paths.items():
        picture = drawn[name]
        assert picture is not None
        save(picture, path)
    sections = [
        "# Tuning "
        f"report\n\n{verdict}\n\n{search_result.reason[0].upper()}{search_result.reason[1:]}.",
        *_finals_section(search_result),
        *(_curves_section(search_result.baseline) if "curves" in paths else []),
        *(_ablation_section(found) if "worth" in paths else []),
        *_runs_section(search_result),
        *_levels_section(winner),
        *_scales_section(winner),
        *_memory_section(accounts, budget_bytes),
    ]
    write_text(folder / "report.md", "\n\n".join(sections) + "\n")
    return paths


# ---- the sections of the report


def _finals_section(search_result: SearchResult) -> list[str]:
    winner, baseline = search_result.winner, search_result.baseline
    rows = []
    for candidate in sorted(search_result.finalists, key=lambda c: _finite_or_last(c.loss)):
        rows.append(
            [
                f"**{candidate.label}**" if candidate is winner else candidate.label,
                _share_in_words(candidate.state_bytes, search_result.adam_state_bytes),
                str(len(candidate.runs)),
                _loss_in_words(candidate.loss),
                *(
                    "-" if candidate is other else _difference_in_words(candidate.against(other))
                    for other in _ends(winner, baseline)
                ),
                f"{candidate.plan.lr:g}",
                describe_scales(candidate.plan),
            ]
        )
    run = winner.runs[0]
    columns = [f"above {'the winner' if c is winner else c.label}" for c in _ends(winner, baseline)]
    return [
        f"## Finals\n\n{search_result.budget.final_steps} steps each on other seeds than the "
        "search; "
        f"evaluated on {sum(run.num_tokens)} tokens in {len(run.num_tokens)} batches. The winner "
        "is in bold.",
        _markdown_table(
            ["plan", "state of the matrices", "seeds", "loss", *columns, "lr", "scales"], rows
        ),
        "The learning rate is that of the full run; shorter ones run with it corrected for their "
        "length. A difference is paired (same weights at the start, same batches, the seeds that "
        "both ran on), in nats per token; above zero the plan of the row is worse. Its 95 % "
        f"interval holds the spread over evaluation batches and a fixed deviation of "
        f"{SEED_DEVIATION:g} from one seed to the next.",
        "![Loss against bytes, short runs and finals](losses.png)",
    ]


def _ends(winner: Candidate, baseline: Candidate) -> list[Candidate]:
    """List what the finals are compared with, each once."""
    return [winner] if winner is baseline else [winner, baseline]


def _curves_section(baseline: Candidate) -> list[str]:
    return [
        f"## Along the run\n\nTraining loss of every finalist minus that of {baseline.label}, "
        "which saw the same batches, as the mean of each window of steps with its 95 % interval. "
        "Below zero it leads; where the band holds zero, noise would do the same. It is training "
        "loss: the decision rests on the evaluation above.",
        "![Training loss against the baseline](curves.png)",
    ]


def _ablation_section(found: Sequence[Ablation]) -> list[str]:
    rows = [
        [
            worth.knob,
            worth.setting + (f" (best of {worth.num_tried})" if worth.num_tried > 1 else ""),
            worth.against,
            f"{worth.steps} x {worth.num_seeds}",
            _difference_in_words(worth.difference),
        ]
        for worth in found
    ]
    return [
        "## What each knob was worth\n\nRuns of the search in pairs that differ in one choice; "
        "below zero it was worth turning. The best of several short runs was chosen by the losses "
        "compared here, which flatters it; the finals ran on other seeds.",
        _markdown_table(["knob", "turned", "against", "steps x seeds", "difference"], rows),
        "![What each knob was worth](worth.png)",
    ]


def _runs_section(search_result: SearchResult) -> list[str]:
    rows = [
        [
            run.description,
            run.stage,
            "mixed" if run.level is None else str(run.level),
            _share_in_words(run.state_bytes, search_result.adam_state_bytes),
            _loss_in_words(run.loss),
        ]
        for run in search_result.trials
    ]
    return [
        f"## Short runs\n\n{search_result.budget.steps} steps each, on one seed, each with a "
        f"complete schedule.{_proxy_scales(search_result.winner.plan)}",
        _markdown_table(["run", "stage", "level", "state of the matrices", "loss"], rows),
    ]


def _proxy_scales(plan: FoldPlan) -> str:
    if plan.proxy_model is None:
        return ""
    ratio = plan.model["hidden_size"] / plan.proxy_model["hidden_size"]
    return (
        f" They ran on the proxy model, where scales are {ratio:.3g} times those at full width; "
        "here they "
        "are as they ran, everywhere else those at full width."
    )


def _levels_section(winner: Candidate) -> list[str]:
    levels = winner.plan.levels
    rows = level_rows(levels)
    return [
        "## Levels of the winner",
        *([_markdown_table(["layers", *ROLES], rows)] if rows else []),
        *describe_levels(levels),
        "![Fold levels by layer and role](levels.png)",
    ]


def _scales_section(winner: Candidate) -> list[str]:
    rows = scale_rows(winner.plan)
    return [
        f"## Scales of the winner\n\nThe step of a matrix is its scale times the learning rate, "
        f"{winner.plan.lr:g} at its peak; that of all else is the learning rate.",
        _markdown_table(["level", *ROLES], rows)
        if rows
        else f"Every matrix at scale {describe_scales(winner.plan)}.",
    ]


def _memory_section(accounts: Mapping[str, Account], budget_bytes: int) -> list[str]:
    rows = [
        [
            term.replace("_", " "),
            *(format_bytes(account.breakdown[term]) for account in accounts.values()),
        ]
        for term in BREAKDOWN
    ]
    peaks = [f"**{format_bytes(account.peak_bytes)}**" for account in accounts.values()]
    return [
        f"## Memory\n\nPredicted for one device, at the moment of the peak; the budget is "
        f"{format_bytes(budget_bytes)}.",
        _markdown_table(["term", *accounts], [*rows, ["**peak**", *peaks]]),
        "![Predicted peak against the budget](memory.png)",
    ]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _share_in_words(num_bytes: int, adam_bytes: int) -> str:
    return f"{format_bytes(num_bytes)} ({num_bytes / adam_bytes:.1%} of Adam's)"


def _finite_or_last(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _loss_in_words(loss: float | None) -> str:
    return "diverged" if loss is None or not math.isfinite(loss) else f"{loss:.4f}"


def _difference_in_words(difference: Difference) -> str:
    if math.isnan(difference.mean):
        return "diverged"
    return f"{difference}" + ("" if difference.is_decided else " (undecided)")

"""The report of a search: what was run, what it lost, and what the winner costs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from foam_lightning.memory.account import Account
from foam_lightning.roles import ROLES
from foam_lightning.run_folder import write_text
from foam_lightning.units import in_words
from tuner.finals import Candidate
from tuner.objective import SEED_DEVIATION, Difference
from tuner.outcome import Outcome
from tuner.pictures import draw_levels, draw_memory, draw_search, save
from tuner.plan_view import (
    BREAKDOWN,
    level_grid,
    level_rows,
    levels_in_words,
)
from tuner.scales import scale_rows, scales_in_words
from tuner.search import FINAL_LENGTH


def write_report(
    folder: Path,
    outcome: Outcome,
    account: Account,
    adam_account: Account | None,
    budget_bytes: int,
) -> dict[str, Path]:
    """Write `report.md` and its pictures; equal outcomes give equal files.

    Args:
        folder: Exists already.
        outcome: What tuning found.
        account: The predicted peak of the winner.
        adam_account: That of level 0 everywhere with the same levers, whether it fits or not.
        budget_bytes: The budget.

    Returns:
        The pictures by name: "levels", "memory" and "search".
    """
    winner = outcome.winner
    accounts = {f"winner: {winner.label}": account}
    if adam_account is not None and winner.kind != "reference":
        accounts = {"Adam (level 0)": adam_account, **accounts}
    grid, _ = level_grid(winner.plan.levels)
    finalists = sorted(outcome.finalists, key=lambda c: _finite_or_last(c.run.loss))
    pictures = {
        "levels": draw_levels(grid, f"Fold levels of the winner: {winner.label}"),
        "memory": draw_memory(accounts, budget_bytes),
        "search": draw_search(
            outcome.searched,
            outcome.adam_state_bytes,
            {c.label: outcome.against_winner.get(c.label) for c in finalists},
        ),
    }
    paths = {name: folder / f"{name}.png" for name in pictures}
    for name, picture in pictures.items():
        save(picture, paths[name])
    sections = [
        f"# Tuning report\n\n{outcome.reason[0].upper()}{outcome.reason[1:]}.",
        *_finals_section(outcome, finalists),
        *_runs_section(outcome),
        *_levels_section(winner),
        *_scales_section(winner),
        *_updates_section(outcome.update_rms),
        *_memory_section(accounts, budget_bytes),
    ]
    write_text(folder / "report.md", "\n\n".join(sections) + "\n")
    return paths


# ---- the sections of the report


def _finals_section(outcome: Outcome, finalists: Sequence[Candidate]) -> list[str]:
    run = outcome.winner.run
    rows = []
    for candidate in finalists:
        rows.append(
            [
                f"**{candidate.label}**" if candidate is outcome.winner else candidate.label,
                _share_in_words(candidate.state_bytes, outcome.adam_state_bytes),
                _loss_in_words(candidate.run.loss),
                _difference_in_words(outcome.against_winner.get(candidate.label)),
                f"{candidate.plan.lr:g}",
                scales_in_words(candidate.plan),
            ]
        )
    steps = FINAL_LENGTH * outcome.short_run_steps
    return [
        f"## Finals\n\n{steps} steps each on another seed than the search; evaluated on "
        f"{sum(run.num_tokens)} tokens in {len(run.num_tokens)} batches. The winner is in bold.",
        _markdown_table(
            ["plan", "state of the matrices", "loss", "above the winner", "lr", "scales"], rows
        ),
        "A difference is paired (same weights at the start, same batches), in nats per token; "
        "above zero the winner is better. Its 95 % interval holds the spread over evaluation "
        f"batches and a fixed deviation of {SEED_DEVIATION:g} from one seed to the next. Gaps "
        "between short runs shrink to about half on longer ones.",
        "![Every run of the search, and the finals](search.png)",
    ]


def _runs_section(outcome: Outcome) -> list[str]:
    rows = [
        [
            run.description,
            run.stage,
            "mixed" if run.level is None else str(run.level),
            _share_in_words(run.state_bytes, outcome.adam_state_bytes),
            _loss_in_words(run.loss),
        ]
        for run in outcome.searched
    ]
    return [
        f"## Short runs\n\n{outcome.short_run_steps} steps each, on one seed, each with a "
        "complete schedule.",
        _markdown_table(["run", "stage", "level", "state of the matrices", "loss"], rows),
    ]


def _levels_section(winner: Candidate) -> list[str]:
    levels = winner.plan.levels
    rows = level_rows(levels)
    return [
        "## Levels of the winner",
        *([_markdown_table(["layers", *ROLES], rows)] if rows else []),
        *levels_in_words(levels),
        "![Fold levels by layer and role](levels.png)",
    ]


def _scales_section(winner: Candidate) -> list[str]:
    rows = scale_rows(winner.plan)
    return [
        f"## Scales of the winner\n\nThe step of a matrix is its scale times the learning rate, "
        f"{winner.plan.lr:g} at its peak; that of all else is the learning rate.",
        _markdown_table(["level", *ROLES], rows)
        if rows
        else f"Every matrix at scale {scales_in_words(winner.plan)}.",
    ]


def _updates_section(rms: Mapping[str, Mapping[int, float]]) -> list[str]:
    if not rms:
        return [
            "## Size of the update\n\nNot measured: it takes a run of Adam that fits the budget "
            "and does not diverge, with gradients kept until the step and model.second_moment "
            "mean_square."
        ]
    levels = sorted({level for by_level in rms.values() for level in by_level})
    rows = [
        [role, *(f"{rms[role][level]:.3f}" if level in rms[role] else "-" for level in levels)]
        for role in (*(role for role in ROLES if role in rms), *sorted(set(rms) - set(ROLES)))
    ]
    return [
        "## Size of the update\n\nRoot mean square of the update before learning rate and scale, "
        "at one step of a run of Adam: its own (level 0), and the one FOAM would have taken. "
        "Nothing rests on it.",
        _markdown_table(["role", *(f"level {level}" for level in levels)], rows),
    ]


def _memory_section(accounts: Mapping[str, Account], budget_bytes: int) -> list[str]:
    rows = [
        [
            term.replace("_", " "),
            *(in_words(account.breakdown[term]) for account in accounts.values()),
        ]
        for term in BREAKDOWN
    ]
    peaks = [f"**{in_words(account.peak_bytes)}**" for account in accounts.values()]
    return [
        f"## Memory\n\nPredicted for one device, at the moment of the peak; the budget is "
        f"{in_words(budget_bytes)}.",
        _markdown_table(["term", *accounts], [*rows, ["**peak**", *peaks]]),
        "![Predicted peak against the budget](memory.png)",
    ]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _share_in_words(num_bytes: int, adam_bytes: int) -> str:
    return f"{in_words(num_bytes)} ({num_bytes / adam_bytes:.1%} of Adam's)"


def _finite_or_last(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _loss_in_words(loss: float | None) -> str:
    return "diverged" if loss is None or not math.isfinite(loss) else f"{loss:.4f}"


def _difference_in_words(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    if math.isnan(difference.mean):
        return "diverged"
    return f"{difference}" + ("" if difference.is_decided else " (undecided)")

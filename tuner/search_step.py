"""The search as a step of a run: on the model or its proxy, with progress on the terminal."""

import math

from foam_lightning.job import Job
from foam_lightning.units import ByteSize
from tuner.console import say, step_progress
from tuner.planning.planner import BudgetPlanner
from tuner.run_context import RunContext
from tuner.search.proxy_model import NoProxyModelError, ProxyModel
from tuner.search.search import search
from tuner.trials.budget import MAX_FINALISTS, SMALLEST_SEARCH, SearchBudget, TuneOptions
from tuner.trials.cache import CachedRunner, job_key, load_earlier_trials
from tuner.trials.results import SearchResult
from tuner.trials.runner import TrialRunner


def search_plan(
    context: RunContext, planner: BudgetPlanner, search_budget: SearchBudget
) -> SearchResult:
    """Search on the model, or on a narrower proxy where Adam, the reference, does not fit.

    Args:
        context: The run.
        planner: The plans that the search may choose from.
        search_budget: How much to search.
    """
    if planner.adam_may_win:
        return _search(context, context.job, planner, search_budget)
    no_adam = f"Adam does not fit {ByteSize(context.budget_bytes)}"
    try:
        proxy_model = ProxyModel(context.job, planner)
    except NoProxyModelError as error:
        say(f"{no_adam}, and there is no proxy model: {error}")
        return _search(context, context.job, planner, search_budget)
    say(f"{no_adam}: tuning on {proxy_model}")
    found = _search(context, proxy_model.job, proxy_model.planner, search_budget)
    return proxy_model.search_result(found)


def _search(
    context: RunContext, job: Job, planner: BudgetPlanner, search_budget: SearchBudget
) -> SearchResult:
    databases = context.folder.other_versions("tuning/study.db")
    earlier = load_earlier_trials(databases, job_key(job))
    seconds = TrialRunner(job, memory_options=context.memory_options).seconds_per_step(
        planner.uniform(planner.uniform_levels[-1])
    )
    say(_announcement(search_budget, job.trainer.max_steps, seconds))
    with step_progress("tuning", search_budget.max_steps_total) as progress:
        (task,) = progress.task_ids

        def on_run(description: str, loss: float) -> None:
            say(f"  loss {loss:.4f}  {description}", console=progress.console)

        def on_steps(count: int) -> None:
            progress.advance(task, count)

        runner = TrialRunner(job, lambda: on_steps(1), memory_options=context.memory_options)
        cached = CachedRunner(runner, earlier, on_steps=on_steps, on_run=on_run)
        return search(planner, cached, context.folder.tuning, search_budget, context.worker)


def _announcement(search_budget: SearchBudget, max_steps: int, seconds: float) -> str:
    most = search_budget.max_steps_total
    share = most / max_steps
    relation = f"{share:.3g}x" if share >= 1 else f"{share:.1%} of"
    return (
        f"search: at most {most} steps ({relation} the full run), "
        f"about {_duration(most * seconds)} at {seconds:.3g} s a step\n"
        f"  {search_budget.num_trials} trials of {search_budget.steps} steps\n"
        f"  a final of up to {MAX_FINALISTS} plans, {search_budget.final_steps} steps each, "
        f"on {_count(search_budget.num_seeds, 'seed')}"
    )


def not_tuned_message(options: TuneOptions, max_steps: int) -> str:
    """Say why there is no search, and what would pay for one."""
    smallest = SMALLEST_SEARCH.max_steps_total
    return (
        f"not tuned: tune.fraction {options.fraction:g} of {max_steps} steps allows "
        f"{options.fraction * max_steps:.0f} steps, and the smallest search takes {smallest}; for "
        f"a search set --tune.fraction {math.ceil(1000 * smallest / max_steps) / 1000:g}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"

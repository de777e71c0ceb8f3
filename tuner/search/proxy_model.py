"""A narrow proxy model to search on where Adam, the reference, does not fit the budget."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

from typing_extensions import override

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.model.roles import role_of
from foam_lightning.plan import FoldPlan, MemoryOptions
from tuner.planning.planner import BudgetPlanner
from tuner.planning.scales import round_to_three_digits
from tuner.trials.results import Candidate, SearchResult, TrialRecord

# A quarter of the width has a sixteenth of the matrix elements: Adam fits wherever the model itself
# does, and a step takes a tenth of the time. Models below the smallest width behave differently.
WIDTH_SHARE = 4
MIN_WIDTH = 64
_SCALES = ("scale", "unfolded_scale")
_Trial = TypeVar("_Trial", Candidate, TrialRecord)


class NoProxyModelError(ConfigError):
    """The model has no proxy model. The message continues "there is no proxy model: "."""


def proxy_sizes(sizes: Mapping[str, Any]) -> dict[str, int]:
    """Choose the sizes of the proxy model: a quarter of the width, but at least 64.

    Heads keep their width, and their number of queries per key, if such heads can make up the
    narrow width; otherwise their number stays and they become narrower. The MLP keeps its ratio to
    the width. Depth and vocabulary do not change.

    Args:
        sizes: `hidden_size`, `intermediate_size`, `num_attention_heads` and `num_key_value_heads`
            of the model.

    Returns:
        The same sizes of the proxy model.

    Raises:
        NoProxyModelError: The proxy model would not be narrower.
    """
    width, heads = int(sizes["hidden_size"]), int(sizes["num_attention_heads"])
    key_value_heads = int(sizes["num_key_value_heads"])
    queries, head_width = heads // key_value_heads, width // heads
    narrow = max(MIN_WIDTH, width // WIDTH_SHARE)
    if narrow % (queries * head_width) == 0:
        heads = narrow // head_width
        key_value_heads = heads // queries
    else:
        narrow = heads * 2 * -(-narrow // (2 * heads))  # rotary embeddings need an even width
    if narrow >= width:
        raise NoProxyModelError(
            f"a proxy of hidden {width} would not be narrower; the smallest width is {MIN_WIDTH}"
        )
    return {
        "hidden_size": narrow,
        "intermediate_size": -(-int(sizes["intermediate_size"]) * narrow // width),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


class ProxyModel:
    """A narrower model to search on, and the conversion of its plans to the full model.

    Depth, roles, vocabulary, data, batch and schedule are those of the full model, and parameters
    have the same names, so that a plan carries over name by name. Scales are inversely proportional
    to the width: the effect of a step of a matrix on its output grows with the number of columns,
    whose steps agree (Yang et al. 2022, arXiv:2203.03466, table 8; measured here: docs/log.md). The
    learning rate stays, and with it the steps of embedding, head and norms.

    Args:
        job: The job at full width.
        planner: Plans of the full model that fit the budget, without Adam.

    Attributes:
        job: The job of the proxy model.
        planner: The plans that the search may run on the proxy model.
        full: The plans at full width.

    Raises:
        NoProxyModelError: The model starts from pre-trained weights, is too narrow, or Adam does
            not fit even with the proxy model.
    """

    def __init__(self, job: Job, planner: BudgetPlanner) -> None:
        if job.model.pretrained is not None:
            raise NoProxyModelError("model.pretrained has no weights for a narrower model")
        self.full = planner
        self._wide = planner.uniform(0).model
        sizes = proxy_sizes(self._wide)
        self._ratio = self._wide["hidden_size"] / sizes["hidden_size"]
        settings: dict[str, Any] = {
            **sizes,
            # May come from the memory options of the budget instead of the settings.
            "state_dtype": planner.memory_options.state_dtype,
            **{key: getattr(job.model, key) * self._ratio for key in _SCALES},
        }
        self.job = replace(job, model=replace(job.model, **settings))
        self.planner: BudgetPlanner = ProxyPlanner(self.job, planner)
        self.planner.check_feasible()

    def __str__(self) -> str:
        wide = self._wide
        narrow = self.planner.uniform(0).model
        return (
            f"a proxy model of hidden {narrow['hidden_size']} (of {wide['hidden_size']}), same "
            f"{wide['num_hidden_layers']} layers"
        )

    def to_full_width(self, plan: FoldPlan) -> FoldPlan:
        """Convert a plan of the proxy model to the full model, within the budget.

        Levels carry over name by name. The state of both models is the same share of Adam's, except
        for the rounding up of blocks and sizes; if that is too much for the budget, the nearest
        levels that fit are taken. A matrix that folds only for that reason gets the most common
        scale of the folded matrices of its role, or else of all folded matrices.

        Args:
            plan: A plan of the proxy model with at least one folded matrix.
        """
        return self._convert(plan, self.full.nearest_levels(plan.levels))

    def search_result(self, found: SearchResult) -> SearchResult:
        """Convert the result of a search on the proxy model to plans and bytes of the full model.

        Only the levels of the winner are changed where they do not fit.
        """
        plan = self.to_full_width(found.winner.plan)
        winner = replace(found.winner, plan=plan, state_bytes=self.full.folded_state_bytes(plan))
        return replace(
            found,
            winner=winner,
            finalists=[
                winner if c is found.winner else self._at_full_width(c) for c in found.finalists
            ],
            trials=[self._at_full_width(trial) for trial in found.trials],
            adam_state_bytes=self.full.folded_state_bytes(self.full.uniform(0)),
            reason=f"on {self}, {found.reason}",
        )

    def _at_full_width(self, trial: _Trial) -> _Trial:
        plan = self._convert(trial.plan, trial.plan.levels)
        return replace(trial, plan=plan, state_bytes=self.full.folded_state_bytes(plan))

    def _convert(self, plan: FoldPlan, levels: Mapping[str, int]) -> FoldPlan:
        scales = {
            name: _folded_scale(plan, name) if levels[name] and not level else plan.scales[name]
            for name, level in plan.levels.items()
        }
        return replace(
            self.full.uniform(0),
            levels=levels,
            scales={
                name: round_to_three_digits(scale / self._ratio) for name, scale in scales.items()
            },
            lr=plan.lr,
            proxy_model=plan.model,
        )


class ProxyPlanner(BudgetPlanner):
    """Plans for a search on a proxy model: the levels that fit the full model, and Adam.

    Args:
        job: The job of the proxy model.
        full: The plans of the full model that fit the budget.
    """

    def __init__(self, job: Job, full: BudgetPlanner) -> None:
        super().__init__(job, full.budget_bytes)
        self._full = full

    @cached_property
    @override
    def _fastest_options(self) -> MemoryOptions | None:
        return self.ladder.find_fastest(lambda options, _: self._fits_uniform(options, 0))

    @override
    def check_feasible(self) -> None:
        """Check that Adam fits the budget.

        Raises:
            NoProxyModelError: It does not, or the settings contradict the memory options it takes.
        """
        if self._fastest_options is None:
            width = self.job.model.hidden_size
            raise NoProxyModelError(f"Adam does not fit the budget at hidden {width} either")
        try:
            self.job.check_memory_options(self._fastest_options)
        except ConfigError as error:
            raise NoProxyModelError(str(error)) from error

    @cached_property
    @override
    def uniform_levels(self) -> list[int]:
        """Level 0, the reference, and the uniform levels that fit at full width."""
        return [0, *self._full.uniform_levels]

    @property
    @override
    def adam_may_win(self) -> bool:
        """False: Adam is only the reference; it does not fit at full width."""
        return False

    @cached_property
    @override
    def max_state_bytes(self) -> int:
        """The same share of Adam's state as the budget leaves at full width.

        It is at least the state of the lowest uniform level, which may be a larger share here,
        since blocks are rounded up.
        """
        full, lowest = self._full, self._full.uniform_levels[0]
        adam_bytes = full.folded_state_bytes(full.uniform(0))
        share = self.folded_state_bytes(self.uniform(0)) * full.max_state_bytes // adam_bytes
        return max(share, self.folded_state_bytes(self.uniform(lowest)))


def _folded_scale(plan: FoldPlan, name: str) -> float:
    """Return the most common scale of the folded matrices of the role, or else of all."""
    folded = [n for n, level in plan.levels.items() if level]
    same_role = [n for n in folded if role_of(n) == role_of(name)]
    scales = [plan.scales[n] for n in same_role or folded]
    return max(dict.fromkeys(scales), key=scales.count)

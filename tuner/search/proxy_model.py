"""A narrow proxy model: where Adam does not fit the budget, the search runs on a narrower model."""

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

# A quarter of the width is a sixteenth of the matrices: Adam fits wherever the model itself does,
# and a step costs a tenth. Below the least width, the proxy model would tell of another kind of
# model.
WIDTH_SHARE = 4
MIN_WIDTH = 64
_SCALES = ("scale", "unfolded_scale")
_Ran = TypeVar("_Ran", Candidate, TrialRecord)


class NoProxyModelError(ConfigError):
    """The model has no proxy model; the message says why, to follow "there is no proxy model: "."""


def proxy_sizes(sizes: Mapping[str, Any]) -> dict[str, int]:
    """Choose the sizes of the proxy model: a quarter of the width, and not below 64.

    Heads stay as wide as they are where such heads make up the width, in groups of as many queries
    as before; else there are as many of them, narrower ones. The MLP keeps its ratio to the width.
    Depth and vocabulary are not here, since they stay.

    Args:
        sizes: `hidden_size`, `intermediate_size`, `num_attention_heads` and `num_key_value_heads`
            of the model.

    Returns:
        The same of the proxy model.

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
        narrow = heads * 2 * -(-narrow // (2 * heads))  # rotation takes columns of a head in pairs
    if narrow >= width:
        raise NoProxyModelError(
            f"hidden {width} is as narrow as a proxy model may be, which has {MIN_WIDTH} or more"
        )
    return {
        "hidden_size": narrow,
        "intermediate_size": -(-int(sizes["intermediate_size"]) * narrow // width),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


class ProxyModel:
    """A narrower model to search on, and the way back from its plans to those of the full one.

    Depth, roles, vocabulary, data, batch and schedule are those of the full model, and parameters
    have the same names, so that a plan carries over name by name. Scales are as 1 to the width:
    what a step of a matrix does to its output grows with the number of its columns, which agree
    (Yang et al. 2022, arXiv:2203.03466, table 8), and so it was measured here (docs/log.md). The
    learning rate stays, and with it the steps of embedding, head and norms.

    Args:
        job: What to train at full width.
        planner: Its plans, none of which is Adam.

    Attributes:
        job: What to train at the width of the proxy model.
        planner: What the search may run there.
        full: The plans at full width.

    Raises:
        NoProxyModelError: The model starts from weights that no narrower one has, or is narrow as
            it is, or Adam does not fit the proxy model either.
    """

    def __init__(self, job: Job, planner: BudgetPlanner) -> None:
        if job.model.pretrained is not None:
            raise NoProxyModelError("no narrower model has the weights of model.pretrained")
        self.full = planner
        self._wide = planner.uniform(0).model
        sizes = proxy_sizes(self._wide)
        self._ratio = self._wide["hidden_size"] / sizes["hidden_size"]
        settings: dict[str, Any] = {
            **sizes,
            # The memory options of the budget may have chosen it.
            "state_dtype": planner.memory_options.state_dtype,
            **{key: getattr(job.model, key) * self._ratio for key in _SCALES},
        }
        self.job = replace(job, model=replace(job.model, **settings))
        self.planner: BudgetPlanner = ProxyPlanner(self.job, planner)
        _ = self.planner.memory_options

    def __str__(self) -> str:
        wide = self._wide
        narrow = self.planner.uniform(0).model
        return (
            f"a proxy model of hidden {narrow['hidden_size']} (of {wide['hidden_size']}), same "
            f"{wide['num_hidden_layers']} layers"
        )

    def to_full_width(self, plan: FoldPlan) -> FoldPlan:
        """Make a plan of the proxy model one of the full model, within the budget.

        Levels carry over name by name. The state of both has the same share of Adam's but for what
        rounding up of blocks and sizes adds; where that is too much, the nearest levels are taken.
        A matrix that folds for that alone takes the scale of those that fold, of its role first.

        Args:
            plan: Of the proxy model, some matrix folded.
        """
        return self._carried(plan, self.full.nearest_levels(plan.levels))

    def search_result(self, found: SearchResult) -> SearchResult:
        """Say what was found on the proxy model in plans and bytes of the full model.

        The winner is made to fit; all else is as it ran.
        """
        plan = self.to_full_width(found.winner.plan)
        winner = replace(found.winner, plan=plan, state_bytes=self.full.folded_state_bytes(plan))
        return replace(
            found,
            winner=winner,
            finalists=[
                winner if c is found.winner else self._at_full_width(c) for c in found.finalists
            ],
            trials=[self._at_full_width(run) for run in found.trials],
            adam_state_bytes=self.full.folded_state_bytes(self.full.uniform(0)),
            reason=f"on {self}, {found.reason}",
        )

    def _at_full_width(self, ran: _Ran) -> _Ran:
        plan = self._carried(ran.plan, ran.plan.levels)
        return replace(ran, plan=plan, state_bytes=self.full.folded_state_bytes(plan))

    def _carried(self, plan: FoldPlan, levels: Mapping[str, int]) -> FoldPlan:
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
    """Plans for a search on a proxy model: the levels of the full model, and Adam.

    Args:
        job: What to train at the width of the proxy model.
        full: The plans of the full model that fit the budget.
    """

    def __init__(self, job: Job, full: BudgetPlanner) -> None:
        super().__init__(job, full.budget_bytes)
        self._full = full

    @cached_property
    @override
    def memory_options(self) -> MemoryOptions:
        """The cheapest memory options with which Adam fits.

        Raises:
            NoProxyModelError: None do, or the settings contradict them.
        """
        found = self.ladder.find_fastest(
            lambda memory_options, _: self._fits_uniform(memory_options, 0)
        )
        if found is None:
            width = self.job.model.hidden_size
            raise NoProxyModelError(f"Adam does not fit the budget at hidden {width} either")
        try:
            self.job.check_memory_options(found)
        except ConfigError as error:
            raise NoProxyModelError(str(error)) from error
        return found

    @cached_property
    @override
    def uniform_levels(self) -> list[int]:
        """The uniform levels that fit at full width, and level 0, which is run beside them."""
        return [0, *self._full.uniform_levels]

    @property
    @override
    def adam_may_win(self) -> bool:
        """False: Adam is what plans are compared with here, and none that could be trained by."""
        return False

    @cached_property
    @override
    def max_state_bytes(self) -> int:
        """The same share of the state of Adam as the budget leaves at full width.

        Blocks are rounded up, which is more of a narrow matrix: the lowest uniform level is always
        within it.
        """
        full, lowest = self._full, self._full.uniform_levels[0]
        adam_bytes = full.folded_state_bytes(full.uniform(0))
        share = self.folded_state_bytes(self.uniform(0)) * full.max_state_bytes // adam_bytes
        return max(share, self.folded_state_bytes(self.uniform(lowest)))


def _folded_scale(plan: FoldPlan, name: str) -> float:
    """Find the scale of the folded matrices of a role, or of any; the most common one."""
    folded = [n for n, level in plan.levels.items() if level]
    alike = [n for n in folded if role_of(n) == role_of(name)] or folded
    scales = [plan.scales[n] for n in alike]
    return max(dict.fromkeys(scales), key=scales.count)

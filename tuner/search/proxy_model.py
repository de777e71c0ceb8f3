"""A narrow twin: where Adam does not fit the budget, the search runs on a narrower model."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

from typing_extensions import override

from foam_lightning.errors import ConfigError
from foam_lightning.job import Job
from foam_lightning.model.roles import role_of
from foam_lightning.plan import FoldPlan, Levers
from foam_lightning.units import ByteSize
from tuner.planning.planner import Fitting
from tuner.planning.scales import rounded
from tuner.search.finals import Candidate
from tuner.trials.results import Outcome, Searched

# A quarter of the width is a sixteenth of the matrices: Adam fits wherever the model itself does,
# and a step costs a tenth. Below the least width, the twin would tell of another kind of model.
WIDTH_SHARE = 4
LEAST_WIDTH = 64
_SCALES = ("scale", "unfolded_scale")
_Ran = TypeVar("_Ran", Candidate, Searched)


class NoTwinError(ConfigError):
    """The model has no twin; the message says why, to follow "there is no twin: "."""


def twin_sizes(sizes: Mapping[str, Any]) -> dict[str, int]:
    """Choose the sizes of the twin: a quarter of the width, and not below 64.

    Heads stay as wide as they are where such heads make up the width, in groups of as many queries
    as before; else there are as many of them, narrower ones. The MLP keeps its ratio to the width.
    Depth and vocabulary are not here, since they stay.

    Args:
        sizes: `hidden_size`, `intermediate_size`, `num_attention_heads` and `num_key_value_heads`
            of the model.

    Returns:
        The same of the twin.

    Raises:
        NoTwinError: The twin would not be narrower.
    """
    width, heads = int(sizes["hidden_size"]), int(sizes["num_attention_heads"])
    key_value_heads = int(sizes["num_key_value_heads"])
    queries, head_width = heads // key_value_heads, width // heads
    narrow = max(LEAST_WIDTH, width // WIDTH_SHARE)
    if narrow % (queries * head_width) == 0:
        heads = narrow // head_width
        key_value_heads = heads // queries
    else:
        narrow = heads * 2 * -(-narrow // (2 * heads))  # rotation takes columns of a head in pairs
    if narrow >= width:
        raise NoTwinError(
            f"hidden {width} is as narrow as a twin may be, which has {LEAST_WIDTH} or more"
        )
    return {
        "hidden_size": narrow,
        "intermediate_size": -(-int(sizes["intermediate_size"]) * narrow // width),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


class Twin:
    """A narrower model to search on, and the way back from its plans to those of the full one.

    Depth, roles, vocabulary, data, batch and schedule are those of the full model, and parameters
    have the same names, so that a plan carries over name by name. Scales are as 1 to the width:
    what a step of a matrix does to its output grows with the number of its columns, which agree
    (Yang et al. 2022, arXiv:2203.03466, table 8), and so it was measured here (docs/log.md). The
    learning rate stays, and with it the steps of embedding, head and norms.

    Args:
        job: What to train at full width.
        fitting: Its plans, none of which is Adam.

    Attributes:
        job: What to train at the width of the twin.
        fitting: What the search may run there.
        full: The plans at full width.

    Raises:
        NoTwinError: The model starts from weights that no narrower one has, or is narrow as it is,
            or Adam does not fit the twin either.
    """

    def __init__(self, job: Job, fitting: Fitting) -> None:
        if job.model.get("pretrained") is not None:
            raise NoTwinError("no narrower model has the weights of model.pretrained")
        self.full = fitting
        self._wide = fitting.uniform(0).model
        sizes = twin_sizes(self._wide)
        self._ratio = self._wide["hidden_size"] / sizes["hidden_size"]
        settings = {
            # The levers of the budget may have chosen it.
            "state_dtype": fitting.levers.state_dtype,
            **{key: fitting.module.hparams[key] * self._ratio for key in _SCALES},
        }
        self.job = replace(job, model={**job.model, **sizes, **settings})
        self.fitting: Fitting = TwinFitting(self.job, fitting)
        _ = self.fitting.levers

    def __str__(self) -> str:
        wide = self._wide
        narrow = self.fitting.uniform(0).model
        return (
            f"a twin of hidden {narrow['hidden_size']} (of {wide['hidden_size']}), same "
            f"{wide['num_hidden_layers']} layers"
        )

    def widened(self, plan: FoldPlan) -> FoldPlan:
        """Make a plan of the twin one of the full model, within the budget.

        Levels carry over name by name. The state of both has the same share of Adam's but for what
        rounding up of blocks and sizes adds; where that is too much, the nearest levels are taken.
        A matrix that folds for that alone takes the scale of those that fold, of its role first.

        Args:
            plan: Of the twin, some matrix folded.
        """
        return self._carried(plan, self.full.nearest(plan.levels))

    def outcome(self, found: Outcome) -> Outcome:
        """Say what was found on the twin in plans and bytes of the full model.

        The winner is made to fit; all else is as it ran.
        """
        plan = self.widened(found.winner.plan)
        winner = replace(found.winner, plan=plan, state_bytes=self.full.folded_bytes(plan))
        return replace(
            found,
            winner=winner,
            finalists=[
                winner if c is found.winner else self._at_full_width(c) for c in found.finalists
            ],
            searched=[self._at_full_width(run) for run in found.searched],
            adam_state_bytes=self.full.folded_bytes(self.full.uniform(0)),
            reason=f"on {self}, {found.reason}",
        )

    def _at_full_width(self, ran: _Ran) -> _Ran:
        plan = self._carried(ran.plan, ran.plan.levels)
        return replace(ran, plan=plan, state_bytes=self.full.folded_bytes(plan))

    def _carried(self, plan: FoldPlan, levels: Mapping[str, int]) -> FoldPlan:
        scales = {
            name: _folded_scale(plan, name) if levels[name] and not level else plan.scales[name]
            for name, level in plan.levels.items()
        }
        return replace(
            self.full.uniform(0),
            levels=levels,
            scales={name: rounded(scale / self._ratio) for name, scale in scales.items()},
            lr=plan.lr,
            twin=plan.model,
        )


class TwinFitting(Fitting):
    """What a search may run on a twin: the levels of the full model, and Adam to compare with.

    Args:
        job: What to train at the width of the twin.
        full: The plans of the full model that fit the budget.
    """

    def __init__(self, job: Job, full: Fitting) -> None:
        super().__init__(job, full.budget_bytes)
        self._full = full

    @cached_property
    @override
    def levers(self) -> Levers:
        """The cheapest levers with which Adam fits.

        Raises:
            NoTwinError: None do, or the settings contradict them.
        """
        found = self.ladder.cheapest(lambda levers, _: self._fits_uniform(levers, 0))
        if found is None:
            width = self.job.model["hidden_size"]
            raise NoTwinError(
                f"Adam does not fit {ByteSize(self.budget_bytes)} at hidden {width} either"
            )
        try:
            self.job.check(found)
        except ConfigError as error:
            raise NoTwinError(str(error)) from error
        return found

    @cached_property
    @override
    def uniform_levels(self) -> list[int]:
        """The uniform levels that fit at full width, and level 0, which is run beside them."""
        return [0, *self._full.uniform_levels]

    @property
    @override
    def adam_fits(self) -> bool:
        """False: Adam is what plans are compared with here, and none that could be trained by."""
        return False

    @cached_property
    @override
    def state_allowance(self) -> int:
        """The same share of the state of Adam as the budget leaves at full width.

        Blocks are rounded up, which is more of a narrow matrix: the lowest uniform level is always
        within it.
        """
        full, lowest = self._full, self._full.uniform_levels[0]
        adam_bytes = full.folded_bytes(full.uniform(0))
        share = self.folded_bytes(self.uniform(0)) * full.state_allowance // adam_bytes
        return max(share, self.folded_bytes(self.uniform(lowest)))


def _folded_scale(plan: FoldPlan, name: str) -> float:
    """Find the scale of the folded matrices of a role, or of any; the most common one."""
    folded = [n for n, level in plan.levels.items() if level]
    alike = [n for n in folded if role_of(n) == role_of(name)] or folded
    scales = [plan.scales[n] for n in alike]
    return max(dict.fromkeys(scales), key=scales.count)

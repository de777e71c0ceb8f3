"""The proxy model: its sizes, what may run on it, and the conversion to the full width."""

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from foam_lightning.errors import PlanError
from foam_lightning.job import Job
from foam_lightning.memory.options import MAX_LEVEL
from foam_lightning.model.roles import role_of
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.run_folder import RunFolder
from tests.support.budgets import smallest_with_state_on_device
from tests.support.runs import NewJob, open_folder
from tuner.pipeline import tune
from tuner.planning.knobs import Knobs
from tuner.planning.levels import LEVELS
from tuner.planning.planner import BudgetPlanner
from tuner.planning.scales import combine_plans, scale_plan
from tuner.run_context import RunContext
from tuner.search.proxy_model import NoProxyModelError, ProxyModel, proxy_sizes
from tuner.search.search import search
from tuner.trials.budget import SearchBudget, TuneOptions
from tuner.trials.cache import CachedRunner
from tuner.trials.results import SearchResult
from tuner.trials.runner import TrialResult, TrialRunner
from tuner.trials.workers import Worker

Fit = Callable[[int], BudgetPlanner]
Sizes = tuple[int, int, int, int]  # hidden, intermediate, heads, heads of keys and values
KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
MODELS: dict[str, tuple[Sizes, Sizes]] = {
    "7B": ((4096, 11008, 32, 32), (1024, 2752, 8, 8)),
    "1.3B, odd": ((2048, 5461, 32, 32), (512, 1366, 8, 8)),
    "70B, grouped": ((8192, 28672, 64, 8), (2048, 7168, 16, 2)),
    # A quarter of two groups is none: narrower heads.
    "two groups": ((2048, 8192, 16, 2), (512, 2048, 16, 2)),
    "the least width": ((128, 352, 4, 4), (64, 176, 2, 2)),
    "heads that do not divide it": ((192, 512, 4, 4), (64, 171, 4, 4)),
    "not even the least width": ((200, 500, 10, 10), (80, 200, 10, 10)),
}
# Shares of the way from the smallest budget with state on the device to that of Adam.
SHARES = (0.0, 0.4, 0.8)
KNOBS = {
    "alike": Knobs(exponent=4.0),
    "q, k low": Knobs(exponent=4.0, q=8.0, k=8.0),
    "early low, at 0 or high": Knobs(exponent=1.0, depth_slope=-1.0),
}


def sizes_of(*sizes: int) -> dict[str, int]:
    return dict(zip(KEYS, sizes, strict=True))


@pytest.mark.parametrize(("wide", "narrow"), MODELS.values(), ids=MODELS.keys())
def test_a_proxy_has_a_quarter_of_the_width_and_heads_of_the_same_width(
    wide: Sizes, narrow: Sizes
) -> None:
    assert proxy_sizes(sizes_of(*wide)) == sizes_of(*narrow)


# ---- which models have none


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"hidden_size": 64}, "hidden 64 .* smallest width is 64"),
        ({"hidden_size": 96, "pretrained": "somewhere"}, "model.pretrained"),
    ],
)
def test_a_model_without_a_proxy_says_why(
    new_job: NewJob, model: dict[str, Any], reason: str
) -> None:
    job = new_job(model={**model, "pretrained": None})
    planner = BudgetPlanner(job, 10**12)
    with pytest.raises(NoProxyModelError, match=reason):
        ProxyModel(replace(job, model=replace(job.model, **model)), planner)


def test_adam_may_not_fit_the_proxy_model_either(new_job: NewJob) -> None:
    # With released gradients and hardly narrower, the state of Adam is more than is spared.
    job = new_job(
        model={"hidden_size": 72, "intermediate_size": 400, "num_attention_heads": 2},
        data={"batch_size": 1, "sequence_length": 4},
    )
    least = BudgetPlanner(job, 10**12).minimum.account.peak_bytes
    with pytest.raises(NoProxyModelError, match=r"at hidden 64 either"):
        ProxyModel(job, BudgetPlanner(job, least, share_traces_with=BudgetPlanner(job, None)))


# ---- what may run on it


@pytest.fixture(scope="module")
def proxies(fit: Fit) -> dict[float, ProxyModel]:
    """Make proxies of one model by the share of the budget."""
    roomy = fit(10**12)
    least = smallest_with_state_on_device(roomy)
    adam = roomy.accountant.account(roomy.uniform(0)).peak_bytes
    found = {}
    for share in SHARES:
        planner = fit(int(least + share * (adam - least)))
        assert not planner.adam_may_win
        found[share] = ProxyModel(planner.job, planner)
    return found


@pytest.fixture(params=SHARES)
def proxy_model(request: pytest.FixtureRequest, proxies: dict[float, ProxyModel]) -> ProxyModel:
    return proxies[request.param]


def share_of_adam(planner: BudgetPlanner, num_bytes: int) -> float:
    return num_bytes / planner.folded_state_bytes(planner.uniform(0))


def test_all_but_the_width_stays(proxy_model: ProxyModel) -> None:
    job, wide = proxy_model.job, proxy_model.full.job
    assert (job.data, job.trainer, job.seed) == (wide.data, wide.trainer, wide.seed)
    module, wide_module = proxy_model.planner.module, proxy_model.full.module
    assert list(module.shapes) == list(wide_module.shapes)
    for name, shape in module.foldable.items():
        for size, wide_size in zip(shape, wide_module.foldable[name], strict=True):
            assert size == math.ceil(wide_size * 64 / 96)
    changed = {*KEYS, "scale", "unfolded_scale", "state_dtype"}
    for key in {field.name for field in fields(wide.model)} - changed:
        assert getattr(job.model, key) == getattr(wide.model, key)
    assert str(proxy_model) == "a proxy model of hidden 64 (of 96), same 4 layers"


def test_adam_runs_within_the_budget_and_is_no_plan_to_train_by(proxy_model: ProxyModel) -> None:
    planner = proxy_model.planner
    assert not planner.adam_may_win
    assert planner.uniform_levels == [0, *proxy_model.full.uniform_levels]
    for level in LEVELS:
        assert planner.fits(planner.uniform(level))


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS.keys())
def test_plans_may_use_the_share_of_adams_state_that_the_full_model_may(
    proxy_model: ProxyModel, knobs: Knobs
) -> None:
    planner = proxy_model.planner
    lowest = proxy_model.full.uniform_levels[0]
    share = share_of_adam(proxy_model.full, proxy_model.full.max_state_bytes)
    allowed = max(
        share, share_of_adam(planner, planner.folded_state_bytes(planner.uniform(lowest)))
    )
    levels = planner.levels_for(knobs, 10**12)
    used = share_of_adam(
        planner, planner.folded_state_bytes(replace(planner.uniform(0), levels=levels))
    )
    assert used <= allowed + 1e-9
    assert used > 0.9 * allowed


# ---- conversion to full width


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS.keys())
def test_a_mixed_plan_of_the_proxy_fits_at_full_width_nearly_as_it_is(
    proxy_model: ProxyModel, knobs: Knobs
) -> None:
    adam = scale_plan(proxy_model.planner.uniform(0), qk_factor=2.5)
    base = scale_plan(proxy_model.planner.uniform(2), lr_factor=1.5, scale_factor=0.7)
    plan = combine_plans(proxy_model.planner.levels_for(knobs, 10**12), unfolded=adam, folded=base)
    wide = proxy_model.to_full_width(plan)
    proxy_model.full.check(wide)
    proxy_model.full.module.set_plan(wide)
    assert (wide.lr, wide.memory_options) == (plan.lr, proxy_model.full.memory_options)
    assert wide.proxy_model == proxy_model.planner.module.uniform_plan(0, plan.memory_options).model
    moved = {name for name, level in plan.levels.items() if wide.levels[name] != level}
    columns = {name: shape[-1] for name, shape in proxy_model.planner.module.foldable.items()}
    # A row folded into one block says nothing of the levels at which a longer one would be.
    ragged = {name for name in moved if 2 ** plan.levels[name] < columns[name]}
    assert len(ragged) <= len(plan.levels) // 4
    for name in set(plan.levels) - moved:
        assert wide.scales[name] == pytest.approx(plan.scales[name] * 64 / 96, rel=5.1e-3)


def test_uniform_plans_of_the_proxy_stay_uniform_at_full_width(proxy_model: ProxyModel) -> None:
    for level in proxy_model.full.uniform_levels:
        plan = scale_plan(proxy_model.planner.uniform(level), lr_factor=0.5, scale_factor=2.0)
        wide = proxy_model.to_full_width(plan)
        asked = scale_plan(proxy_model.full.uniform(level), lr_factor=0.5, scale_factor=2.0)
        assert (wide.levels, wide.lr) == (asked.levels, asked.lr)
        assert wide.scales == pytest.approx(asked.scales, rel=5.1e-3)


def test_a_matrix_that_must_fold_at_full_width_alone_takes_the_scale_of_folded_ones(
    proxies: dict[float, ProxyModel],
) -> None:
    proxy_model = proxies[0.0]  # whose budget leaves no matrix at level 0
    narrow = proxy_model.planner.uniform(MAX_LEVEL)
    scales = {name: {"v": 0.9, "o": 0.3}.get(role_of(name), 0.6) for name in narrow.scales}
    first = [name for name in narrow.levels if ".0." in name and role_of(name) in ("v", "q")]
    every_k = [name for name in narrow.levels if role_of(name) == "k"]
    low = dict.fromkeys([*first, *every_k], 0)
    plan = replace(
        narrow, levels={**narrow.levels, **low}, scales={**scales, **dict.fromkeys(low, 0.1)}
    )
    wide = proxy_model.to_full_width(plan)
    proxy_model.full.check(wide)
    for name in low:
        assert wide.levels[name] > 0
        expected = 0.9 if role_of(name) == "v" else 0.6
        assert wide.scales[name] == pytest.approx(expected * 64 / 96, rel=5.1e-3)


# ---- the search


class FakeRunner(TrialRunner):
    """Computes a loss that rises with the mean level, so that Adam is best."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.plans: list[FoldPlan] = []

    def run(self, plan: FoldPlan, **_: Any) -> TrialResult:
        self.plans.append(plan)
        loss = 3 + sum(plan.levels.values()) / len(plan.levels)
        return TrialResult([loss * 8] * 3, [8] * 3)


@pytest.fixture
def found(
    proxies: dict[float, ProxyModel], tmp_path: Path
) -> tuple[ProxyModel, FakeRunner, SearchResult]:
    proxy_model = proxies[0.4]
    runner, budget = FakeRunner(proxy_model.job), SearchBudget(8, 6, 1)
    found = search(proxy_model.planner, CachedRunner(runner), tmp_path, budget)
    return proxy_model, runner, found


def test_a_search_on_the_proxy_runs_adam_and_never_chooses_it(
    found: tuple[ProxyModel, FakeRunner, SearchResult],
) -> None:
    proxy_model, runner, search_result = found
    sizes = proxy_model.planner.uniform(0).model
    assert all(plan.model == sizes for plan in runner.plans)
    assert any(set(plan.levels.values()) == {0} for plan in runner.plans)
    assert search_result.loss_of("reference") == 3
    assert search_result.winner.kind != "reference"
    with pytest.raises(PlanError, match=r"hidden_size 64, .* 96"):
        proxy_model.full.module.set_plan(search_result.winner.plan)


def test_its_result_has_plans_and_bytes_of_the_full_model(
    found: tuple[ProxyModel, FakeRunner, SearchResult],
) -> None:
    proxy_model, _, narrow = found
    wide = proxy_model.search_result(narrow)
    planner = proxy_model.full
    assert wide.winner in wide.finalists
    assert wide.winner.plan == proxy_model.to_full_width(narrow.winner.plan)
    planner.check(wide.winner.plan)
    assert wide.reason == f"on a proxy model of hidden 64 (of 96), same 4 layers, {narrow.reason}"
    assert wide.adam_state_bytes == planner.folded_state_bytes(planner.uniform(0))
    for one, other in zip(wide.finalists, narrow.finalists, strict=True):
        assert (one.kind, one.label, one.runs) == (other.kind, other.label, other.runs)
        assert one.state_bytes == planner.folded_state_bytes(one.plan)
    adam = next(c for c in wide.finalists if c.kind == "reference")
    assert set(adam.plan.levels.values()) == {0}
    assert adam.state_bytes == wide.adam_state_bytes
    for run in wide.trials:
        assert run.state_bytes == planner.folded_state_bytes(run.plan)


# ---- the whole of it


def tuned(job: Job, budget_bytes: int, root: Path) -> RunFolder:
    folder = open_folder(root)
    context = RunContext(
        job=job,
        planner=BudgetPlanner(job, budget_bytes),
        folder=folder,
        tune_options=TuneOptions(trials=4, steps=2),
        worker=Worker(folder.tuning, "tune"),
    )
    tune(context)
    return folder


def without_adam(job: Job) -> int:
    """Give a budget that level 1 fits, with a little room, and Adam does not."""
    planner = BudgetPlanner(job, 10**12)
    return planner.accountant.account(planner.uniform(1)).peak_bytes + 4096


@pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself
def test_a_plan_tuned_on_a_proxy_is_rehearsed_at_full_width_and_says_so(
    new_job: NewJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = new_job(model={"hidden_size": 96, "intermediate_size": 172})
    folder = tuned(job, without_adam(job), tmp_path)
    printed = capsys.readouterr().out
    assert "B: tuning on a proxy model of hidden 64 (of 96), same 2 layers\n" in printed
    plan = FoldPlan.load(folder.plan)
    job.new_module().set_plan(plan)
    assert plan.proxy_model is not None
    assert (plan.proxy_model["hidden_size"], plan.proxy_model["num_hidden_layers"]) == (64, 2)
    assert set(plan.levels.values()) != {0}
    *_, rehearsal = json.loads((folder.tuning / "rehearsal.json").read_text(encoding="utf-8"))
    assert rehearsal["fold_plan"] == plan.to_json()
    report = (folder.tuning / "report.md").read_text(encoding="utf-8")
    assert "on a proxy model of hidden size 64" in report
    assert "scales are 1.5 times" in report
    assert "split-lr Adam" in report


@pytest.mark.filterwarnings("ignore")
def test_without_a_proxy_the_search_continues_without_adam_and_says_why(
    new_job: NewJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = new_job()
    folder = tuned(job, without_adam(job), tmp_path)
    printed = capsys.readouterr().out
    assert "no proxy model: a proxy of hidden 32 " in printed
    assert FoldPlan.load(folder.plan).proxy_model is None
    assert "split-lr Adam" not in (folder.tuning / "report.md").read_text(encoding="utf-8")

"""Made-up plans, runs and results of a search, for tests of tables, plots and the report."""

import math
from collections.abc import Sequence
from dataclasses import replace

from foam_lightning.memory.account import Account
from foam_lightning.model.roles import ROLES
from foam_lightning.plan import FoldPlan, MemoryOptions
from tuner.trials.budget import SearchBudget
from tuner.trials.results import Candidate, Kind, SearchResult, TrialRecord
from tuner.trials.runner import TrialResult

ADAM_STATE = 4_096_000
BREAKDOWN = {
    "weights": 5_300_000,
    "gradients": 5_300_000,
    "optimizer_state": 3_100_000,
    "activations": 6_100_000,
    "loss": 8_400_000,
    "workspace": 0,
    "context": 600_000,
    "margin": 1_128_000,
    "slack": 0,
}
ACCOUNT = Account(BREAKDOWN)
ADAM_ACCOUNT = Account({**BREAKDOWN, "optimizer_state": 10_600_000})
PEAK = 29_928_000


def name_of(layer: int, role: str) -> str:
    block = "self_attn" if role in "qkvo" else "mlp"
    return f"model.layers.{layer}.{block}.{role}_proj.weight"


def uniform_plan(level: int, num_layers: int = 4) -> FoldPlan:
    return FoldPlan(
        model={"hidden_size": 128},
        levels={name_of(i, role): level for i in range(num_layers) for role in ROLES},
        scales={
            name_of(i, role): 0.25 if level or role in ("q", "k") else 0.1
            for i in range(num_layers)
            for role in ROLES
        },
        lr=0.02,
        memory_options=MemoryOptions(
            micro_batch_size=4, accumulate_grad_batches=2, chunked_loss=True
        ),
    )


def mixed_plan(num_layers: int = 4) -> FoldPlan:
    """Make a plan at level 2, but for q, k and down of the last layer."""
    plan = uniform_plan(2, num_layers)
    last = {
        name_of(num_layers - 1, role): level for role, level in (("q", 1), ("k", 1), ("down", 4))
    }
    scales = {name: {1: 0.2, 2: 0.25, 4: 0.3}[level] for name, level in last.items()}
    return replace(plan, levels={**plan.levels, **last}, scales={**plan.scales, **scales})


def run_at(loss: float) -> TrialResult:
    """Make a run; batches and steps vary alike in all runs, so that differences have no noise."""
    nats = [(loss + 0.002 * (i % 5 - 2)) * 1000 for i in range(16)]
    curve = [
        loss + (4 - loss % 1) * math.exp(-step / 30) + 0.1 * math.sin(7 * step)
        for step in range(320)
    ]
    return TrialResult(nats, [1000] * 16, curve)


def search_result_of(
    winner: Candidate, *others: Candidate, trials: Sequence[TrialRecord] = ()
) -> SearchResult:
    return SearchResult(
        winner=winner,
        finalists=[*others, winner],
        trials=trials,
        adam_state_bytes=ADAM_STATE,
        budget=SearchBudget(num_trials=12, steps=160, num_seeds=2),
        reason=f"{winner.label}: significantly better than every other finalist",
    )


def with_scale(plan: FoldPlan, lr: float, scale: float) -> FoldPlan:
    return replace(plan, lr=lr, scales=dict.fromkeys(plan.levels, scale))


def candidate(kind: Kind, label: str, plan: FoldPlan, share: float, *losses: float) -> Candidate:
    return Candidate(kind, label, plan, int(ADAM_STATE * share), [run_at(loss) for loss in losses])


TUNED_ADAM, ADAM = (with_scale(uniform_plan(0), *it) for it in ((0.033, 0.04), (0.02, 0.05)))
REFERENCE = candidate("reference", "split-lr Adam", TUNED_ADAM, 1, 3.47, 3.49)
CONFIGURED = candidate("reference", "split-lr Adam as configured, lr 0.02", ADAM, 1, 3.49)
CONFIGURED = replace(CONFIGURED, is_configured=True)
UNIFORM = candidate("uniform", "uniform level 2", uniform_plan(2), 1 / 4, 3.41, 3.43)
HIGHER = candidate("uniform", "uniform level 3", uniform_plan(3), 1 / 8, 3.393, 3.4)
MIXED = candidate("mixed", "mixed levels 1-4", mixed_plan(), 1 / 4, 3.37, 3.39)
DIVERGED = candidate("uniform", "uniform level 1", uniform_plan(1), 1 / 2, math.nan)


def short_run(level: int, lr: float, scale: float, loss: float) -> TrialRecord:
    """Make a short run at one level; 0.02 is the configured learning rate."""
    plan = with_scale(uniform_plan(level), lr, scale)
    description = f"uniform level {level}, lr {lr:g}, scale {scale:g}"
    state_bytes = ADAM_STATE // 2**level
    return TrialRecord("uniform", description, plan, run_at(loss), state_bytes, lr == 0.02)


def mixed_run(number: int, loss: float, state_bytes: int) -> TrialRecord:
    return TrialRecord("mixed", f"mixed {number}", mixed_plan(), run_at(loss), state_bytes, False)


TRIALS = [
    short_run(0, 0.02, 0.05, 3.701),
    short_run(0, 0.04, 0.1, 5.812),
    short_run(0, 0.033, 0.04, 3.686),
    short_run(1, 0.02, 0.25, 3.641),
    short_run(2, 0.02, 0.25, 3.652),
    short_run(3, 0.02, 0.25, 3.668),
    short_run(8, 0.02, 0.25, 3.697),
    short_run(2, 0.033, 0.4, 3.628),
    short_run(2, 0.05, 0.6, math.nan),
    short_run(1, 0.049, 0.62, math.nan),
    mixed_run(0, 3.621, 1_020_000),
    mixed_run(1, 3.611, 1_023_000),
    mixed_run(2, 3.659, 1_021_000),
]
TUNED = search_result_of(MIXED, REFERENCE, CONFIGURED, UNIFORM, HIGHER, trials=TRIALS)
NO_REFERENCE = search_result_of(UNIFORM, HIGHER, trials=TRIALS[4:7])
ONE_DIVERGED = search_result_of(UNIFORM, DIVERGED, trials=TRIALS[8:10])
ALL_DIVERGED = search_result_of(
    DIVERGED, replace(DIVERGED, label="uniform level 2"), trials=TRIALS[8:10]
)
ADAM_WINS = search_result_of(REFERENCE, trials=TRIALS[:1])

"""A made-up search: plans, runs and what it found, for tests of what is shown of them."""

import math
from dataclasses import replace

from foam_lightning.memory.account import Account
from foam_lightning.plan import FoldPlan, Levers
from foam_lightning.roles import ROLES
from tuner.finals import Candidate
from tuner.objective import ShortRun, paired_difference
from tuner.outcome import Outcome, Searched

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
}
ACCOUNT = Account(BREAKDOWN)
ADAM_ACCOUNT = Account({**BREAKDOWN, "optimizer_state": 10_600_000})
PEAK = 29_928_000
RMS = {role: {0: 0.44, 1: 0.62, 2: 0.65, 4: 0.67, 8: 0.68} for role in ROLES}


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
        levers=Levers(micro_batch_size=4, accumulate_grad_batches=2, chunked_loss=True),
    )


def mixed_plan(num_layers: int = 4) -> FoldPlan:
    """Make all layers alike but the last, which has its q and k lower and its down higher."""
    plan = uniform_plan(2, num_layers)
    last = {
        name_of(num_layers - 1, role): level for role, level in (("q", 1), ("k", 1), ("down", 4))
    }
    scales = {name: {1: 0.2, 2: 0.25, 4: 0.3}[level] for name, level in last.items()}
    return replace(plan, levels={**plan.levels, **last}, scales={**plan.scales, **scales})


def run_at(loss: float) -> ShortRun:
    """Make a run whose batches differ from each other in the same way in every run."""
    tokens = [1000] * 16
    return ShortRun([(loss + 0.002 * (i % 5 - 2)) * 1000 for i in range(16)], tokens)


def outcome_of(winner: Candidate, *others: Candidate, searched: list[Searched]) -> Outcome:
    return Outcome(
        winner=winner,
        finalists=[*others, winner],
        against_winner={c.label: paired_difference([c.run], [winner.run]) for c in others},
        searched=searched,
        update_rms=RMS,
        adam_state_bytes=ADAM_STATE,
        short_run_steps=160,
        reason=f"{winner.label} is better than every other finalist beyond its interval",
    )


REFERENCE = Candidate("reference", uniform_plan(0), run_at(3.48), ADAM_STATE)
UNIFORM = Candidate("uniform", uniform_plan(2), run_at(3.42), ADAM_STATE // 4)
HIGHER = Candidate("uniform", uniform_plan(3), run_at(3.393), ADAM_STATE // 8)
MIXED = Candidate("mixed", mixed_plan(), run_at(3.38), ADAM_STATE // 4)
DIVERGED = Candidate("uniform", uniform_plan(1), run_at(math.nan), ADAM_STATE // 2)

SEARCHED = [
    Searched("uniform", "uniform level 0, lr 0.02, scale 0.05", 0, ADAM_STATE, 3.701),
    Searched("uniform", "uniform level 0, lr 0.04, scale 0.1", 0, ADAM_STATE, 5.812),
    Searched("uniform", "uniform level 1, lr 0.02, scale 0.25", 1, ADAM_STATE // 2, 3.641),
    Searched("uniform", "uniform level 2, lr 0.02, scale 0.25", 2, ADAM_STATE // 4, 3.652),
    Searched("uniform", "uniform level 3, lr 0.02, scale 0.25", 3, ADAM_STATE // 8, 3.668),
    Searched("uniform", "uniform level 8, lr 0.02, scale 0.25", 8, ADAM_STATE // 256, 3.697),
    Searched("uniform", "uniform level 2, lr 0.033, scale 0.4", 2, ADAM_STATE // 4, 3.628),
    Searched("uniform", "uniform level 2, lr 0.05, scale 0.6", 2, ADAM_STATE // 4, None),
    Searched("uniform", "uniform level 1, lr 0.049, scale 0.62", 1, ADAM_STATE // 2, None),
    Searched("mixed", "mixed 0", None, 1_020_000, 3.621),
    Searched("mixed", "mixed 1", None, 1_023_000, 3.611),
    Searched("mixed", "mixed 2", None, 1_021_000, 3.659),
]
TUNED = outcome_of(MIXED, REFERENCE, UNIFORM, HIGHER, searched=SEARCHED)
NO_REFERENCE = outcome_of(UNIFORM, HIGHER, searched=SEARCHED[3:6])
ALL_DIVERGED = outcome_of(UNIFORM, DIVERGED, searched=SEARCHED[7:9])
ADAM_WINS = outcome_of(REFERENCE, searched=SEARCHED[:1])

"""FOAM (Wen et al. 2025, arXiv:2512.07112) in Python floats, one number at a time.

Written from the equations and the decisions on them, not from the package: the package is tested
against it. A matrix is a list of rows, a row a list of floats (float64).
"""

from dataclasses import dataclass, field
from math import sqrt

Matrix = list[list[float]]


@dataclass
class Settings:
    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    level: int = 2
    scale: float = 0.25
    rho: float = 1.0
    mean_square: bool = True
    correct_moments_only: bool = False


@dataclass
class State:
    t: int = 0
    m: Matrix = field(default_factory=list)
    v: Matrix = field(default_factory=list)


def block_means(row: list[float], level: int) -> list[float]:
    """Average the columns that exist in each block of 2**level."""
    means = []
    start = 0
    while start < len(row):
        stop = min(start + 2**level, len(row))
        total = 0.0
        for column in range(start, stop):
            total += row[column]
        means.append(total / (stop - start))
        start = stop
    return means


def step(weight: Matrix, gradient: Matrix, state: State, s: Settings) -> Matrix:
    """Return the updated weight; `state` moves on by one step."""
    if state.t == 0:
        state.m = [[0.0] * len(block_means(row, s.level)) for row in gradient]
        state.v = [[0.0] * len(block_means(row, s.level)) for row in gradient]
    state.t += 1
    correction1 = 1 - s.beta1**state.t
    correction2 = 1 - s.beta2**state.t
    updated = []
    for r, g in enumerate(gradient):
        g_hat = block_means(g, s.level)
        g_square = block_means([value * value for value in g], s.level)
        for k in range(len(g_hat)):
            second = g_square[k] if s.mean_square else g_hat[k] ** 2
            state.m[r][k] = s.beta1 * state.m[r][k] + (1 - s.beta1) * g_hat[k]
            state.v[r][k] = s.beta2 * state.v[r][k] + (1 - s.beta2) * second
        new_row = []
        for c in range(len(g)):
            k = c // 2**s.level
            residual = g[c] - g_hat[k]
            if s.correct_moments_only:
                first = state.m[r][k] / correction1 + s.rho * residual
                second = state.v[r][k] / correction2 + s.rho**2 * residual**2
            else:
                first = (state.m[r][k] + s.rho * residual) / correction1
                second = (state.v[r][k] + s.rho**2 * residual**2) / correction2
            decayed = (1 - s.lr * s.weight_decay) * weight[r][c]
            new_row.append(decayed - s.lr * s.scale * first / (sqrt(second) + s.eps))
        updated.append(new_row)
    return updated

"""Adam-mini and Muon with a folded first moment, in Python floats, one number at a time.

Written from the papers' equations, not from the package: the package is tested against it.
"""

from math import sqrt

from tests.reference.foam_paper import Matrix, Settings, State, block_means


def _first_moment(gradient: Matrix, state: State, s: Settings) -> Matrix:
    """Move m on and return unfold(m) + rho * E."""
    if state.t == 0:
        state.m = [[0.0] * len(block_means(row, s.level)) for row in gradient]
        state.v = [[0.0] for _ in gradient]
    state.t += 1
    unfolded = []
    for r, g in enumerate(gradient):
        g_hat = block_means(g, s.level)
        for k in range(len(g_hat)):
            state.m[r][k] = s.beta1 * state.m[r][k] + (1 - s.beta1) * g_hat[k]
        unfolded.append(
            [
                state.m[r][c // 2**s.level] + s.rho * (g[c] - g_hat[c // 2**s.level])
                for c in range(len(g))
            ]
        )
    return unfolded


def adam_mini_step(weight: Matrix, gradient: Matrix, state: State, s: Settings) -> Matrix:
    """One second moment for each row, the mean of its squares (Adam-mini, algorithm 1)."""
    first = _first_moment(gradient, state, s)
    updated = []
    for r, g in enumerate(gradient):
        mean_square = sum(value * value for value in g) / len(g)
        state.v[r][0] = s.beta2 * state.v[r][0] + (1 - s.beta2) * mean_square
        root = sqrt(state.v[r][0] / (1 - s.beta2**state.t)) + s.eps
        size = s.lr * s.scale / (1 - s.beta1**state.t)
        updated.append(
            [
                (1 - s.lr * s.weight_decay) * weight[r][c] - size * first[r][c] / root
                for c in range(len(g))
            ]
        )
    return updated


def muon_momentum(gradient: Matrix, state: State, s: Settings) -> Matrix:
    """What Muon makes orthogonal, with the momentum folded."""
    return _first_moment(gradient, state, s)

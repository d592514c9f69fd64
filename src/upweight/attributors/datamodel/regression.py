"""Linear regressions of outcomes on subset masks, at a grid of penalties, and their choice on held-out masks.

Masks Z [subset, train] are 0 or 1, outcomes Y [subset, query]; every estimator gives weights w [query, train] with
``Y_q ~ b + Z w_q``. Penalties are relative to the smallest one that leaves nothing (lasso) or to the mean eigenvalue
(ridge), so that one grid serves all queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import rankdata

Array = np.ndarray
Estimator = Literal["lasso", "ridge", "difference"]

LEVELS: dict[str, Array] = {
    "lasso": np.logspace(0, -2.5, 26),
    "ridge": np.logspace(4, -4, 25),
    "difference": np.ones(1),
}
"""Relative penalties that cross-validation chooses from, strongest first."""


@dataclass(frozen=True)
class Chosen:
    """Weights at the penalties that held-out masks chose.

    Attributes:
        weights: [query, train].
        levels: relative penalty of every query, [query].
        penalties: the same as the objective has it, [query].
        errors: mean held-out squared error of every query over its variance there, [query].
    """

    weights: Array
    levels: Array
    penalties: Array
    errors: Array


def centred(Z: Array, Y: Array) -> tuple[Array, Array]:
    """Masks and outcomes without their means: what is left for w once the intercept b is out."""
    return Z - Z.mean(0), Y - Y.mean(0)


def least_squares(Z: Array, Y: Array) -> Array:
    """Weights w [query, train] of least squares, the smallest where several fit as well."""
    X, T = centred(Z, Y)
    return np.linalg.lstsq(X, T, rcond=1e-10)[0].T


def difference_of_means(Z: Array, Y: Array) -> Array:
    """``mean of Y where i was trained on - mean where it was not`` [query, train]; 0 where one of the two is empty."""
    inside = Z.sum(0)
    both = (inside > 0) & (inside < len(Z))
    means = (Y.T @ Z) / np.maximum(inside, 1) - (Y.T @ (1 - Z)) / np.maximum(len(Z) - inside, 1)
    return np.where(both, means, 0.0)


def lasso(X: Array, t: Array, penalties: Array) -> Array:
    """Weights w [penalty, train] of ``|t - X w|^2 / 2J + penalty |w|_1`` at every penalty, from one LARS path."""
    from sklearn.linear_model import lars_path

    alphas, _, path = lars_path(X, t, method="lasso", alpha_min=float(penalties.min()))  # pyright: ignore[reportArgumentType]
    order = np.argsort(alphas)
    knots, corners = alphas[order], path.T[order]
    # The path is linear between its knots.
    right = np.clip(np.searchsorted(knots, penalties), 1, max(1, len(knots) - 1))
    if len(knots) == 1:
        return np.zeros((len(penalties), X.shape[1]))
    left = right - 1
    span = np.maximum(knots[right] - knots[left], np.finfo(float).tiny)
    share = np.clip((penalties - knots[left]) / span, 0.0, 1.0)[:, None]
    return (1 - share) * corners[left] + share * corners[right]


def ridge(X: Array, T: Array, penalties: Array) -> Array:
    """Weights w [penalty, query, train] of ``|t - X w|^2 / 2J + penalty |w|^2 / 2``, by the masks' Gram matrix."""
    values, vectors = np.linalg.eigh(X @ X.T)
    rotated = vectors.T @ T  # [subset, query]
    filtered = rotated / (np.maximum(values, 0)[:, None] + len(X) * penalties[:, None, None])
    return np.einsum("jn,ljq->lqn", vectors.T @ X, filtered, optimize=True)


def scale_of(estimator: Estimator, X: Array, T: Array) -> Array:
    """What relative penalties are relative to, [query]."""
    if estimator == "lasso":
        return np.abs(X.T @ T).max(0) / len(X)
    return np.full(T.shape[1], (X * X).sum() / len(X) ** 2)


def fitted(estimator: Estimator, Z: Array, Y: Array, levels: Array) -> Array:
    """Weights [level, query, train] at every relative penalty."""
    if estimator == "difference":
        return difference_of_means(Z, Y)[None]
    X, T = centred(Z, Y)
    scale = scale_of(estimator, X, T)
    if estimator == "ridge":
        return ridge(X, T, levels * scale[0])
    X = np.asfortranarray(X)
    found = np.zeros((len(levels), Y.shape[1], Z.shape[1]))
    for query in np.flatnonzero(scale > 1e-12 * np.abs(Y).max(initial=0.0)):
        found[:, query] = lasso(X, T[:, query], levels * scale[query])
    return found


def chosen(estimator: Estimator, Z: Array, Y: Array, folds: Sequence[Array]) -> Chosen:
    """Weights of all masks at the penalty that predicts held-out masks best, query by query."""
    levels = LEVELS[estimator]
    squared, total = np.zeros((len(levels), Y.shape[1])), np.zeros(Y.shape[1])
    for held_out in folds:
        rest = np.setdiff1d(np.arange(len(Z)), held_out)
        mean = Y[rest].mean(0)
        moved = Z[held_out] - Z[rest].mean(0)
        residual = (Y[held_out] - mean).T  # [query, held out]
        for query in range(0, Y.shape[1], 32):  # a few at a time: weights of all levels are many numbers
            part = slice(query, query + 32)
            weights = fitted(estimator, Z[rest], Y[rest, part], levels)
            squared[:, part] += np.square(residual[part] - weights @ moved.T).sum(2)
        total += np.square(residual).sum(1)
    best = squared.argmin(0)
    # From the strongest penalty down to the weakest that a query chose: LARS then stops early.
    weights = np.zeros((Y.shape[1], Z.shape[1]))
    for level in np.unique(best):
        mine = best == level
        weights[mine] = fitted(estimator, Z, Y[:, mine], levels[level : level + 1])[0]
    share = np.divide(squared.min(0), total, out=np.ones_like(total), where=total > 0)
    scale = scale_of(estimator, *centred(Z, Y))
    return Chosen(weights, levels[best], levels[best] * scale, share)


def split(groups: Array, folds: int, seed: int) -> list[Array]:
    """Positions held out by each fold, [folds]; subsets of one group stay together."""
    names = np.unique(groups)
    number = np.empty(len(names), int)
    number[np.random.default_rng(seed).permutation(len(names))] = np.arange(len(names)) % folds
    fold_of = number[np.searchsorted(names, groups)]
    return [np.flatnonzero(fold_of == fold) for fold in range(folds)]


def groups_of(Z: Array, blocks: Array | None) -> Array:
    """A number for every subset; equal for copies, for complements, and for those drawn together."""
    parent = list(range(len(Z)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    seen: dict[object, int] = {}
    for row, mask in enumerate(Z.astype(bool)):
        turned = mask if mask[0] else ~mask
        keys: list[object] = [np.packbits(turned).tobytes()]
        if blocks is not None:
            keys.append(("block", blocks[row]))
        for key in keys:
            parent[root(row)] = root(seen.setdefault(key, row))
    return np.array([root(row) for row in range(len(Z))])


def spearman(x: Array, y: Array) -> Array:
    """Rank correlation [query] of two tables [query, subset]; 0 where one of them is constant, which ranks nothing."""
    a, b = (rankdata(table, axis=1) for table in (x, y))
    a, b = (table - table.mean(1, keepdims=True) for table in (a, b))
    size = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), size, out=np.zeros(len(x)), where=size > 0)

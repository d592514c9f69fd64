"""Linear regressions of outcomes on subset masks, at a grid of penalties, and their choice on held-out masks.

Masks Z [subset, train] are 0 or 1, outcomes Y [subset, query]; every estimator gives weights w [query, train] with
``Y_q ~ b + Z w_q``. Penalties are relative to the smallest one that leaves nothing (lasso) or to the mean eigenvalue
(ridge), so that one grid serves all queries.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from scipy.stats import rankdata

Array = np.ndarray
Estimator = Literal["lasso", "ridge", "difference", "shapley"]

LEVELS: dict[str, Array] = {
    "lasso": np.logspace(0, -3, 25),
    "ridge": np.logspace(4, -4, 25),
    "difference": np.ones(1),
    "shapley": np.ones(1),
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


def shapley(Z: Array, Y: Array) -> Array:
    """Shapley values [query, train] up to a constant that all examples share, of subsets of all sizes alike.

    With a_k and b_k the mean outcomes of subsets of k examples with and without i,

        phi_i = (Y(all) - Y(none)) / n + (1 - 1/n) mean over k = 1 .. n-1 of (a_k - b_k),

    and with sizes drawn uniformly, ``E Y (Z_i n/k - (1 - Z_i) n/(n - k))`` is that mean. The second factor has the mean
    0 at every size, so that a trend of Y over sizes may be taken off first: it would be noise.
    """
    n, k = Z.shape[1], Z.sum(1, keepdims=True)
    trend = np.concatenate([np.ones_like(k), k / n, np.log(k / n), np.log(1 - k / n)], 1)
    rest = Y - trend @ np.linalg.lstsq(trend, Y, rcond=1e-10)[0]
    contrast = Z * (n / k) - (1 - Z) * (n / (n - k))
    return (1 - 1 / n) * (rest.T @ contrast) / len(Z)


def compressed(X: Array, T: Array) -> tuple[Array, Array]:
    """Fewer rows with the same least-squares objective up to a constant: as many as the masks have rank.

    Complementary masks are one row, so that half as many rows are left of pairs.
    """
    values, vectors = np.linalg.eigh(X @ X.T)
    kept = vectors[:, values > 1e-10 * values[-1]]
    return kept.T @ X, kept.T @ T


def lasso(rows: Array, t: Array, penalties: Array, subsets: int) -> Array:
    """Weights w [penalty, train] of ``|t - X w|^2 / 2J + penalty |w|_1``, from one LARS path.

    LARS drops examples whose masks are combinations of others', and may end a little off the minimum; a single penalty,
    which is one whose weights are wanted for themselves, is brought there by coordinate descent.

    Args:
        rows: the compressed masks: of full rank, without which LARS is lost among copies.
        t: the compressed outcomes of one query.
        penalties: strongest first.
        subsets: J.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lars_path, lasso_path

    wanted = penalties[::-1] * subsets / len(rows)
    with warnings.catch_warnings():  # of ending the path where nothing is left to explain
        warnings.simplefilter("ignore", ConvergenceWarning)
        alphas, _, path = lars_path(rows, t, method="lasso", alpha_min=wanted[0], max_iter=4 * len(rows) + 10)
    knots, corners = alphas[::-1], path.T[::-1]
    if len(knots) == 1:
        return np.zeros((len(wanted), rows.shape[1]))
    # The path is linear between its knots.
    right = np.clip(np.searchsorted(knots, wanted), 1, len(knots) - 1)
    span = np.maximum(knots[right] - knots[right - 1], np.finfo(float).tiny)
    share = np.clip((wanted - knots[right - 1]) / span, 0.0, 1.0)[:, None]
    weights = ((1 - share) * corners[right - 1] + share * corners[right])[::-1]
    if len(weights) > 1:
        return weights
    with warnings.catch_warnings():  # of a duality gap that rounding keeps above the tolerance
        warnings.simplefilter("ignore", ConvergenceWarning)
        start, alphas = weights[0], cast(Any, wanted)  # scikit-learn annotates it too narrowly
        return lasso_path(rows, t, alphas=alphas, coef_init=start, tol=1e-10, max_iter=2000)[1].T


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
    if estimator == "shapley":
        return shapley(Z, Y)[None]
    X, T = centred(Z, Y)
    scale = scale_of(estimator, X, T)
    if estimator == "ridge":
        return ridge(X, T, levels * scale[0])
    rows, targets = compressed(X, T)
    rows, found = np.asfortranarray(rows), np.zeros((len(levels), Y.shape[1], Z.shape[1]))
    for query in np.flatnonzero(scale > 1e-12 * np.abs(Y).max(initial=0.0)):
        found[:, query] = lasso(rows, targets[:, query], levels * scale[query], len(Z))
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

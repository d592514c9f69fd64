"""Rank correlation with weights: a bootstrap resample of the observations, without building it."""

from __future__ import annotations

import numpy as np

__all__ = ["spearman", "weighted_pearson", "weighted_ranks"]


def spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Spearman's rank correlation of the columns of two tables; ties get their mean rank.

    Args:
        x: [observation, column].
        y: [observation, column].
        weights: [resample, observation], how often each observation counts; once, if None.

    Returns:
        [column], or [resample, column]; NaN where one of the two is constant.

    Example:
        >>> x = np.array([[1.0], [2.0], [3.0]])
        >>> spearman(x, np.array([[10.0], [40.0], [40.0]])).round(4).tolist()
        [0.866]
    """
    plain = weights is None
    weights = np.ones((1, len(x))) if weights is None else weights
    result = np.empty((len(weights), x.shape[1]))
    for column in range(x.shape[1]):
        a, b = x[:, column], y[:, column]
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            result[:, column] = np.nan
            continue
        result[:, column] = weighted_pearson(weighted_ranks(a, weights), weighted_ranks(b, weights), weights)
    return result[0] if plain else result


def weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mid-ranks of the values in each weighted sample, [resample, observation], up to the constant 1/2.

    An observation's mid-rank is the weight below it plus half of the weight tied with it.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.searchsorted(ordered, ordered, side="left")
    last = np.searchsorted(ordered, ordered, side="right")
    below = np.zeros((len(weights), len(values) + 1))
    np.cumsum(weights[:, order], axis=1, out=below[:, 1:])
    ranks = np.empty_like(weights)
    ranks[:, order] = (below[:, first] + below[:, last]) / 2
    return ranks


def weighted_pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's correlation within each row of [resample, observation]; NaN where one of the two is constant.

    Constant means to 12 digits of the numbers themselves, whatever their scale: scores of 1e-10 are not.
    """
    total = weights.sum(axis=1, keepdims=True)
    (x, x_size), (y, y_size) = _of_size_one(x), _of_size_one(y)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total
    y = y - (weights * y).sum(axis=1, keepdims=True) / total
    xx, yy, xy = ((weights * a * b).sum(axis=1) for a, b in ((x, x), (y, y), (x, y)))
    # A constant leaves rounding noise, not zero.
    noise = 1e-24 * weights.sum(axis=1)
    varies = (xx > noise) & (yy > noise) & (x_size > 0) & (y_size > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(varies, np.clip(xy / np.sqrt(xx * yy), -1, 1), np.nan)


def _of_size_one(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row over its largest absolute value, and that value, [resample]."""
    size = np.abs(values).max(axis=1)
    return values / np.where(size > 0, size, 1.0)[:, None], size

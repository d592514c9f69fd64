"""Where to put a threshold: by expected precision, or by the false discovery rate against the bulk."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr

FEWEST = 10
"""Examples below which nothing is estimated."""
NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


def expected_precision_cut(suspicion: np.ndarray, wrong: np.ndarray, precision: float) -> np.ndarray:
    """Which examples to flag, [n] bool: the first k of the detector's order, k as large as the precision allows.

    The expected precision of the first k is the mean posterior among them. The last ones must also be wrong rather
    than right themselves (or as likely wrong as was asked for, if that is less), as a pool of neighbours in the order
    (isotonic regression) sees it. Equal suspicions are flagged together.

    Example:
        >>> expected_precision_cut(np.array([3.0, 2.0, 1.0, 0.0]), np.array([0.9, 0.8, 0.6, 0.1]), 0.8)
        array([ True,  True, False, False])
    """
    order = np.argsort(-suspicion, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(suspicion[order]) != 0, True))
    expected = (np.cumsum(wrong[order]) / np.arange(1, len(order) + 1))[ends]
    pooled = pooled_posterior(suspicion, wrong)[order][ends]
    enough = np.flatnonzero((expected >= precision - 1e-12) & (pooled >= min(0.5, precision)))
    flags = np.zeros(len(order), bool)
    if len(enough):
        flags[order[: ends[enough[-1]] + 1]] = True
    return flags


def pooled_posterior(suspicion: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """The posterior as a function of the suspicion alone, which never falls as that rises (isotonic regression)."""
    from sklearn.isotonic import IsotonicRegression

    ranks = np.unique(suspicion, return_inverse=True)[1].reshape(-1)
    return np.clip(IsotonicRegression().fit(ranks, wrong).predict(ranks), 0, 1)


def tail(values: np.ndarray) -> np.ndarray:
    """Chance of a value so large if it were one of the bulk, [n]: normal, with the bulk's median and spread.

    Medians look away from the very values that are looked for (an empirical null). All 1/2 where there is no spread,
    or there are too few examples.
    """
    middle = float(np.median(values))
    spread = NORMAL_MAD * float(np.median(np.abs(values - middle)))
    if len(values) < FEWEST or not spread > 1e-12 * max(abs(middle), 1e-300):
        return np.full(len(values), 0.5)
    return ndtr(-(values - middle) / spread)


def discoveries(chances: np.ndarray, precision: float) -> np.ndarray:
    """Which of these are no chance, [n] bool: the Benjamini-Hochberg rule at a false discovery rate of 1 - precision.

    Example:
        >>> discoveries(np.array([1e-6, 0.5, 0.4, 0.9]), 0.8)
        array([ True, False, False, False])
    """
    n = len(chances)
    order = np.argsort(chances, kind="stable")
    allowed = (1 - precision) * np.arange(1, n + 1) / n
    passing = np.flatnonzero(chances[order] <= allowed)
    flags = np.zeros(n, bool)
    if len(passing):
        flags[order[: passing[-1] + 1]] = True
    return flags

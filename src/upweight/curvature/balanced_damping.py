"""The damping at which examples of a subset and those left out of it matter alike.

An example is as likely to be in a random subset as not, and what it does to a model is the same question either way:
removed from a subset that holds it, or added to the rest. Over many examples the two must be of one size. A curvature
that is trusted too much in directions where training is undecided makes removals too large, one that is damped too much
makes additions too large, so that their ratio falls as the damping grows and is 1 where the model of training is right.
No retraining is needed to see it.

Of a sample of examples the ratio is known up to its standard error, and where many examples share few directions it
hardly moves with the damping: if the least damping is within three standard errors of 1, or below, it stays. Where
training stopped so early that only the largest damping that is tried comes near 1, that one is taken.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

from torch import Tensor

from upweight.errors import UpweightError

FACTOR = 4.0
"""Between the dampings of the search until one is too small and the next too large."""
MOST = 16
"""Such steps in either direction."""
PRECISE = 1.15
"""Ratio of the last two dampings: the scores hardly differ between them."""
SIGNIFICANT = 3.0
"""Standard errors."""
ALIKE = 1.25
"""A ratio up to which, either way, nothing is said."""


def log_ratio(removals: Tensor, additions: Tensor) -> tuple[float, float]:
    """``log(mean removals / mean additions)`` of sizes [k] and [l], and its standard error.

    Raises:
        UpweightError: all of one kind are zero, or one is not finite.
    """
    means = removals.mean(), additions.mean()
    for name, mean in zip(("removals", "additions"), means, strict=True):
        if not 0 < float(mean) < math.inf:
            raise UpweightError(
                f"{name} change other examples by {float(mean):.3g} in the mean, expected a finite number above 0 -> "
                "give damping= a number; or look for outputs that are constant, fitted exactly, or not finite"
            )
    parts = [
        (v.var() / len(v) / m**2) if len(v) > 1 else m * 0
        for v, m in zip((removals, additions), means, strict=True)
    ]
    return float((means[0] / means[1]).log()), float((parts[0] + parts[1]).sqrt())


def balanced_damping(
    ratio: Callable[[float], tuple[float, float]], start: float, least: float
) -> tuple[float, tuple[float, float]]:
    """The damping at which the logarithm of a ratio that falls with it is 0, by bisection.

    Args:
        ratio: `log_ratio` of removals and additions at a damping.
        start: where to begin, above 0.
        least: the smallest damping, which stays unless removals are significantly larger there.

    Returns:
        The damping, and the ratio there with its standard error. Warns where it is far from 1.

    Raises:
        UpweightError: removals are the larger ones up to very large dampings, or nothing changes anything.

    Example:
        >>> damping, (found, _) = balanced_damping(lambda d: (math.log(0.03 / d), 0.1), 1.0, 1e-9)
        >>> round(damping / 0.03, 1), round(found, 1)
        (1.0, 1.0)
    """
    first = now = ratio(least)
    if first[0] <= SIGNIFICANT * first[1]:
        return least, _told(first)
    low, high = least, max(start, least)
    for _ in range(MOST):
        now = ratio(high)
        if now[0] <= 0:
            break
        low, high = high, high * FACTOR
    else:
        unmoved = first[0] - now[0] <= SIGNIFICANT * math.hypot(first[1], now[1])
        damping, (size, error) = (least, first) if unmoved else (high, now)
        if size <= max(math.log(ALIKE), SIGNIFICANT * error):
            return damping, _told((size, error))
        raise UpweightError(
            f"removals are larger than additions up to a damping of {high:.3g}, so that none makes examples inside and "
            "outside the subsets alike -> check that each subset is what its model was trained on, or damping="
        )
    low = max(low, high * FACTOR**-MOST)
    while high / low > PRECISE:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if ratio(middle)[0] > 0 else (low, middle)
    middle = (low * high) ** 0.5
    return middle, _told(ratio(middle))


def _told(found: tuple[float, float]) -> tuple[float, float]:
    """The ratio itself and its standard error; warn if it is surely not near 1."""
    size, error = found
    if abs(size) > max(math.log(ALIKE), SIGNIFICANT * error):
        warnings.warn(
            f"removals are {math.exp(size):.2g} times as large as additions at the damping that was found, expected 1 "
            "-> check that each subset is what its model was trained on, that the model is near a minimum, and l2",
            stacklevel=6,
        )
    return math.exp(size), math.exp(size) * error

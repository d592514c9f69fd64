"""The damping at which examples of a subset and those left out of it matter alike.

An example is as likely to be in a random subset as not, and what it does to a model is the same question either way:
removed from a subset that holds it, or added to the rest. Over many examples the two must be of one size. A curvature
that is trusted too much in directions where training is undecided makes removals too large, one that is damped too much
makes additions too large, so that their ratio falls as the damping grows and is 1 where the model of training is right.
No retraining is needed to see it.
"""

from __future__ import annotations

from collections.abc import Callable

from upweight.errors import UpweightError

FACTOR = 4.0
"""Between the dampings of the search until one is too small and the next too large."""
MOST = 16
"""Such steps in either direction."""
PRECISE = 1.15
"""Ratio of the last two dampings: the scores hardly differ between them."""


def balanced_damping(ratio: Callable[[float], float], start: float, least: float) -> tuple[float, float]:
    """The damping at which a ratio that falls with it is 1, by bisection of its logarithm.

    Args:
        ratio: of the size of removals to that of additions, at a damping.
        start: where to begin, above 0.
        least: the smallest damping tried; where even that one is too large, it is the answer.

    Returns:
        The damping and its ratio.

    Raises:
        UpweightError: removals are the larger ones up to very large dampings.

    Example:
        >>> damping, found = balanced_damping(lambda d: 0.03 / d, 1.0, 1e-9)
        >>> round(damping / 0.03, 1), round(found, 1)
        (1.0, 1.0)
    """
    low = high = max(start, least)
    found = ratio(high)
    if found > 1:
        for _ in range(MOST):
            low, high = high, high * FACTOR
            if ratio(high) <= 1:
                break
        else:
            raise UpweightError(
                f"removals are larger than additions up to a damping of {high:.3g}, so that none makes examples inside "
                "and outside the subsets alike -> check that each subset is what its model was trained on, or damping="
            )
    else:
        for _ in range(MOST):
            if low <= least:
                return least, found
            low, high = max(least, low / FACTOR), low
            found = ratio(low)
            if found > 1:
                break
        else:
            return low, found
    while high / low > PRECISE:
        middle = (low * high) ** 0.5
        found = ratio(middle)
        low, high = (middle, high) if found > 1 else (low, middle)
    middle = (low * high) ** 0.5
    return middle, ratio(middle)

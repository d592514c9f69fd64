"""How likely each label is wrong: what a threshold is calibrated with.

Two steps of finding label errors are kept apart. A *detector* puts the examples in order (`suspicion`); the *posterior*
of each label, from evidence that is calibrated, says how far down that order to go (`thresholds`): for classes by
probabilities that did not see the label (`class_posterior`), for numbers by the residuals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from upweight.repair.thresholds import FEWEST, NORMAL_MAD


@dataclass(frozen=True)
class Posterior:
    """What the evidence says of every label.

    Attributes:
        wrong: [n], the chance that the given label is wrong.
        suggested: [n], the label that the evidence prefers, the given one's own vote aside.
        probability: [n], the chance that the suggested label is right.
        info: how it was estimated, JSON-able.
    """

    wrong: np.ndarray
    suggested: np.ndarray
    probability: np.ndarray
    info: dict[str, Any]


def residual_posterior(residuals: np.ndarray, predictions: np.ndarray) -> Posterior:
    """The chance that each number is wrong: that its residual belongs to the wide part of two normal distributions.

        r ~ (1 - e) N(0, s^2) + e N(0, w^2),    w > s

    fitted by expectation-maximisation. Errors of measurement are assumed normal; where they have heavier tails of
    their own, these are flagged too.

    Args:
        residuals: given label less prediction, [n].
        predictions: what is suggested instead, [n].

    Example:
        >>> r = np.append(np.linspace(-2, 2, 500), [12.0, -15.0])
        >>> found = residual_posterior(r, np.zeros(502))
        >>> bool((found.wrong[500:] > 0.99).all()), int((found.wrong[:500] > 0.5).sum())
        (True, 0)
    """
    r2 = residuals.astype(np.float64) ** 2
    n = len(r2)
    narrow = max(float(np.median(r2)) * NORMAL_MAD**2, 1e-300)
    far = r2 > 9 * narrow
    share = (far.sum() + 0.5) / (n + 1)
    wide = float(r2[far].mean()) if far.any() else 0.0
    if n < FEWEST or not far.any() or wide <= 4 * narrow:
        nothing = np.zeros(n)
        info = {"calibration": "two normal distributions of residuals", "noise_rate": 0.0}
        return Posterior(nothing, predictions, 1 - nothing, info)
    wrong = far.astype(float)
    for _ in range(200):
        logs = [
            math.log(weight) - 0.5 * math.log(variance) - 0.5 * r2 / variance
            for weight, variance in ((1 - share, narrow), (share, wide))
        ]
        wrong = 1 / (1 + np.exp(np.clip(logs[0] - logs[1], -700, 700)))
        # One imagined example on either side keeps a part from dying out.
        share = (wrong.sum() + 0.5) / (n + 1)
        narrow = max(float(((1 - wrong) @ r2) / (1 - wrong).sum()), 1e-300)
        wide = max(float((wrong @ r2) / max(wrong.sum(), 1e-9)), 4 * narrow)
    info = {
        "calibration": "two normal distributions of residuals",
        "noise_rate": round(float(wrong.mean()), 4),
        "deviation": narrow**0.5,
        "deviation_of_wrong_ones": wide**0.5,
    }
    return Posterior(wrong, predictions, wrong, info)

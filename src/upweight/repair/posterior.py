"""How likely each label is wrong, and where to put a threshold for a wanted precision.

Two steps, kept apart:

* A *posterior* for each example, from evidence that is calibrated: for classes, out-of-sample probabilities and the
  noise that they imply (`class_posterior`); for numbers, the residuals (`residual_posterior`).
* A *detector* puts the examples in order. Among its first k, the expected share of wrong labels is the mean posterior;
  the threshold is the largest k at which it still reaches the wanted precision (`expected_precision_cut`).

A detector that knows more than the posterior's evidence does better than expected, so that the promise is kept.

Sources: anchor points for the noise, "Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach"
(arXiv 1609.03683); temperature, "On Calibration of Modern Neural Networks" (arXiv 1706.04599).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import ndtr

ANCHORS = 0.1
"""Share of the examples predicted to be of a class, the most confident ones, that are taken to be of it for certain."""
FEWEST_ANCHORS = 10
STEPS = 30
"""Of the deconvolution."""
FEWEST = 10
"""Examples below which nothing is estimated."""
NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


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


# Classes -----------------------------------------------------------------------------------------------------------


def class_posterior(probabilities: np.ndarray, given: np.ndarray) -> Posterior:
    """The chance that each label is wrong, from probabilities of labels by something that did not see that label.

    With p(b|x) the chance of the *given* (noisy) label b, and T[a, b] that of the given label b where a is true,

        p(b|x) = sum_a P(a|x) T[a, b],    P(a | x, b) = P(a|x) T[a, b] / p(b|x).

    p is tempered so that it fits the given labels best, which it has not seen; T is what the labels of the most
    confident examples show (anchor points); P(a|x) follows by deconvolution (the Richardson-Lucy iteration, which is
    maximum likelihood and keeps probabilities). Where the noise is worse on unclear examples than on clear ones, T is
    too mild, and too few labels are called wrong rather than too many.

    Args:
        probabilities: [n, class], each row of a model or a vote without that example.
        given: class numbers [n].

    Returns:
        The posterior; ``suggested`` is the most probable class of P(a|x), the given one among equals.

    Example:
        >>> votes = np.repeat(np.eye(2) * 0.9 + 0.05, 50, axis=0)  # fifty clear examples of each class
        >>> given = np.repeat([0, 1], 50)
        >>> given[0] = 1
        >>> found = class_posterior(votes, given)
        >>> bool(found.wrong[0] > 0.8), int(found.suggested[0]), bool(found.wrong[1:].max() < 0.05)
        (True, 0, True)
    """
    n, classes = probabilities.shape
    p, temperature = _tempered(probabilities, given)
    T = noise_matrix(p, given)
    clean = p.copy()
    for start in range(0, n, 4096):  # rows are independent
        rows = slice(start, start + 4096)
        for _ in range(STEPS):
            clean[rows] *= (p[rows] / (clean[rows] @ T)) @ T.T
            clean[rows] /= clean[rows].sum(1, keepdims=True)
    joint = clean * T[:, given].T  # P(a|x) T[a, b]
    joint /= joint.sum(1, keepdims=True)
    every = np.arange(n)
    favoured = clean.copy()
    favoured[every, given] *= 1 + 1e-9
    suggested = favoured.argmax(1)
    share = np.bincount(given, minlength=classes) / n
    info = {
        "calibration": "noise at the most confident examples of each class, and the labels' own probabilities",
        "noise_rate": round(float((1 - joint[every, given]).mean()), 4),
        "noise_of_the_most_confident": round(float(share @ (1 - np.diag(T))), 4),
        "temperature": round(temperature, 3),
    }
    return Posterior(1 - joint[every, given], suggested, joint[every, suggested], info)


def noise_matrix(p: np.ndarray, given: np.ndarray) -> np.ndarray:
    """T[a, b]: the chance of the given label b where a is true, [class, class], from the most confident examples.

    Counts of each class's anchors are joined with a few imagined ones of the mean noise: classes with few anchors do
    not swing, and no chance is zero.
    """
    classes = p.shape[1]
    if classes == 1:
        return np.ones((1, 1))
    top, sure = p.argmax(1), p.max(1)
    counts = np.zeros((classes, classes))
    for a in range(classes):
        mine = np.flatnonzero(top == a)
        wanted = min(len(mine), max(FEWEST_ANCHORS, math.ceil(ANCHORS * len(mine))))
        anchors = mine[np.argsort(-sure[mine], kind="stable")[:wanted]]
        counts[a] = np.bincount(given[anchors], minlength=classes)
    seen = counts.sum()
    noise = (seen - np.trace(counts) + 1) / (seen + 2)  # Laplace's rule: never zero
    imagined = np.full((classes, classes), noise / (classes - 1))
    np.fill_diagonal(imagined, 1 - noise)
    T = (counts + FEWEST_ANCHORS * imagined) / (counts.sum(1, keepdims=True) + FEWEST_ANCHORS)
    return T


def _tempered(probabilities: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, float]:
    """``p^(1/t)``, normalised, at the t that makes the given labels likeliest; and t."""
    logs = np.log(np.clip(probabilities, 1e-6, None))
    every = np.arange(len(given))

    def tempered(t: float) -> np.ndarray:
        scaled = logs / t
        scaled -= scaled.max(1, keepdims=True)
        powers = np.exp(scaled)
        return powers / powers.sum(1, keepdims=True)

    def surprise(log_t: float) -> float:
        return -float(np.log(tempered(math.exp(log_t))[every, given]).mean())

    best = minimize_scalar(surprise, bounds=(math.log(0.2), math.log(20)), method="bounded")
    t = math.exp(float(best.x))  # type: ignore[attr-defined]
    return tempered(t), t


# Numbers -----------------------------------------------------------------------------------------------------------


def residual_posterior(residuals: np.ndarray, predictions: np.ndarray) -> Posterior:
    """The chance that each number is wrong: that its residual belongs to the wide part of two normal distributions.

        r ~ (1 - e) N(0, s^2) + e N(0, w^2),    w > s

    fitted by expectation-maximisation. Errors of measurement are assumed normal; where they have heavier tails of
    their own, these are flagged too.

    Args:
        residuals: given label less prediction, [n].
        predictions: what is suggested instead, [n].

    Example:
        >>> generator = np.random.default_rng(0)
        >>> r = np.append(generator.normal(size=500), [12.0, -15.0])
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


# Thresholds --------------------------------------------------------------------------------------------------------


def expected_precision_cut(suspicion: np.ndarray, wrong: np.ndarray, precision: float) -> np.ndarray:
    """Which examples to flag, [n] bool: the first k of the detector's order, k as large as the precision allows.

    The expected precision of the first k is the mean posterior among them. The last ones must also be wrong rather
    than right themselves, as a pool of neighbours in the order (isotonic regression) sees it. Equal suspicions are
    flagged together.

    Example:
        >>> expected_precision_cut(np.array([3.0, 2.0, 1.0, 0.0]), np.array([0.9, 0.8, 0.6, 0.1]), 0.8)
        array([ True,  True, False, False])
    """
    order = np.argsort(-suspicion, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(suspicion[order]) != 0, True))
    expected = (np.cumsum(wrong[order]) / np.arange(1, len(order) + 1))[ends]
    pooled = pooled_posterior(suspicion, wrong)[order][ends]
    enough = np.flatnonzero((expected >= precision - 1e-12) & (pooled >= 0.5))
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

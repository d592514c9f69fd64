"""The chance that a class label is wrong, from probabilities that did not see it.

With P(a|x) the chance of the true class a and T[a, b] that of the given label b where a is true,

    P(a | x, b) = P(a|x) T[a, b] / p(b|x),    p(b|x) = sum_a P(a|x) T[a, b],

so both parts are needed: what the inputs say of the true class, and how noisy the labels are. A weak network and noisy
labels look alike in p(b|x), and only something else tells them apart:

* with trusted labels of other examples (the validation data), P(a|x) is calibrated there, and T is the noise that best
  explains the given labels;
* without, the most confident examples of each class are taken to be of it for certain (anchor points): their labels
  show T, and P(a|x) follows from p(b|x) by deconvolution. Where even those disagree with their labels too often, no
  label is called wrong.

Sources: anchor points, "Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach" (arXiv
1609.03683); calibration, "On Calibration of Modern Neural Networks" (arXiv 1706.04599).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize, minimize_scalar

from upweight.repair.posterior import Posterior

ANCHORS = 0.1
"""Share of the examples predicted to be of a class, the most confident ones, that are taken to be of it for certain."""
FEWEST_ANCHORS = 10
MOST_NOISE, WIDEST_GAP = 0.3, 0.15
"""Noise of the anchors above which they are no anchors, and by how much the other labels may be less predictable."""
IMAGINED = 50
"""Imagined examples of each class, with the mean noise, beside those that T is estimated from."""
FEWEST_TRUSTED = 50
"""Validation examples below which nothing is calibrated on them."""
STEPS = 50
"""Of the iterations for P and for T."""

Reference = tuple[np.ndarray, np.ndarray]
"""Probabilities [m, class] of other examples from the same source, and their true classes [m]."""


def class_posterior(
    probabilities: np.ndarray, given: np.ndarray, reference: Reference | None = None
) -> Posterior:
    """The chance that each label is wrong.

    Args:
        probabilities: [n, class], each row of a model or a vote without that example.
        given: class numbers [n].
        reference: the same for examples whose classes are known for certain.

    Returns:
        The posterior; ``suggested`` is the most probable class by P(a|x), the given one among equals.

    Example:
        >>> votes = np.repeat(np.eye(2) * 0.9 + 0.05, 50, axis=0)  # fifty clear examples of each class
        >>> given = np.repeat([0, 1], 50)
        >>> given[0] = 1
        >>> found = class_posterior(votes, given)
        >>> bool(found.wrong[0] > 0.8), int(found.suggested[0]), bool(found.wrong[1:].max() < 0.05)
        (True, 0, True)
    """
    n = len(probabilities)
    logs = np.log(np.clip(probabilities, 1e-6, None))
    every = np.arange(n)
    facts: dict[str, float | str | int]
    if reference is not None and len(reference[1]) >= FEWEST_TRUSTED:
        held_out = np.log(np.clip(reference[0], 1e-6, None))
        slope, offsets = _calibration(held_out, reference[1])
        P = _softmax(slope * logs + offsets)  # (n, class)
        T = _explaining_noise(P, given)
        # The same for labels that are right shows what noise the imperfect P alone pretends.
        pretended = _noise(
            _explaining_noise(_softmax(slope * held_out + offsets), reference[1]), reference[1]
        )
        T = _milder(T, _noise(T, given), pretended)
        facts = {"calibration": f"{len(reference[1])} validation labels, taken to be right"}
    else:
        p = _softmax(logs / _temperature(logs, given))
        T = _anchored_noise(p, given)
        P = _deconvolved(p, T)
        facts = {"calibration": "labels of the most confident examples, taken to be clear"}
    noise = _noise(T, given)
    joint = P * T[:, given].T  # (n, class)
    joint /= joint.sum(1, keepdims=True)
    wrong = 1 - joint[every, given]
    if "clear" in str(facts["calibration"]):
        gap = 1 - noise - float((P.argmax(1) == given).mean())
        if noise > MOST_NOISE or gap > WIDEST_GAP:
            facts["withheld"] = (
                f"{1 - noise:.0%} of the labels of the clearest examples are as predicted, {1 - noise - gap:.0%} of "
                "all: a weak network and noisy labels look alike; validation data would tell them apart"
            )
            wrong = np.zeros(n)
    favoured = P.copy()
    favoured[every, given] *= 1 + 1e-9
    suggested = favoured.argmax(1)
    facts |= {"noise_rate": round(float(wrong.mean()), 4), "noise_of_clear_examples": round(noise, 4)}
    return Posterior(wrong, suggested, joint[every, suggested], facts)


# With trusted labels -------------------------------------------------------------------------------------------------


def _calibration(logs: np.ndarray, true: np.ndarray) -> tuple[float, np.ndarray]:
    """Slope and offsets [class] of ``softmax(slope log p + offset)`` that make the true classes likeliest.

    A normal prior of deviation 1 on the offsets keeps classes with few examples where they are.
    """
    m, classes = logs.shape
    target = np.eye(classes)[true]

    def cost(theta: np.ndarray) -> tuple[float, np.ndarray]:
        slope, offsets = theta[0], theta[1:]
        scores = slope * logs + offsets
        top = scores.max(1, keepdims=True)
        log_sum = top[:, 0] + np.log(np.exp(scores - top).sum(1))
        error = np.exp(scores - log_sum[:, None]) - target
        value = float((log_sum - scores[np.arange(m), true]).sum() + offsets @ offsets / 2)
        return value, np.append((error * logs).sum(), error.sum(0) + offsets)

    start = np.append(1.0, np.zeros(classes))
    bounds = [(0.0, 20.0), *[(None, None)] * classes]
    best = minimize(cost, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(best[0]), best[1:]


def _explaining_noise(P: np.ndarray, given: np.ndarray) -> np.ndarray:
    """T [class, class] that makes the given labels likeliest, by expectation-maximisation."""
    classes = P.shape[1]
    T = _uniform_noise(0.1, classes)
    for _ in range(STEPS):
        joint = P * T[:, given].T
        joint /= joint.sum(1, keepdims=True)
        counts = np.zeros((classes, classes))
        np.add.at(counts.T, given, joint)
        T = _joined(counts, IMAGINED)
    return T


# Without -------------------------------------------------------------------------------------------------------------


def _anchored_noise(p: np.ndarray, given: np.ndarray) -> np.ndarray:
    """T [class, class] as the most confident examples of each class show it."""
    classes = p.shape[1]
    top, sure = p.argmax(1), p.max(1)
    counts = np.zeros((classes, classes))
    for a in range(classes):
        mine = np.flatnonzero(top == a)
        wanted = min(len(mine), max(FEWEST_ANCHORS, math.ceil(ANCHORS * len(mine))))
        anchors = mine[np.argsort(-sure[mine], kind="stable")[:wanted]]
        counts[a] = np.bincount(given[anchors], minlength=classes)
    return _joined(counts, FEWEST_ANCHORS)


def _deconvolved(p: np.ndarray, T: np.ndarray) -> np.ndarray:
    """P [n, class] with ``p = P T``, likeliest among probabilities: the Richardson-Lucy iteration."""
    P = p.copy()
    for start in range(0, len(p), 4096):  # rows are independent
        rows = slice(start, start + 4096)
        for _ in range(STEPS):
            P[rows] *= (p[rows] / (P[rows] @ T)) @ T.T
            P[rows] /= P[rows].sum(1, keepdims=True)
    return P


def _temperature(logs: np.ndarray, given: np.ndarray) -> float:
    """T at which ``p^(1/t)`` makes the given labels, which p has not seen, likeliest."""
    every = np.arange(len(given))

    def surprise(log_t: float) -> float:
        return -float(np.log(_softmax(logs / math.exp(log_t))[every, given]).mean())

    best = minimize_scalar(surprise, bounds=(math.log(0.2), math.log(20)), method="bounded")
    return math.exp(float(best.x))  # type: ignore[attr-defined]


# Shared --------------------------------------------------------------------------------------------------------------


def _joined(counts: np.ndarray, imagined: int) -> np.ndarray:
    """Rows of counts with imagined ones of the mean noise, as chances: few counts do not swing, and none is zero."""
    total, classes = counts.sum(), len(counts)
    noise = (total - np.trace(counts) + 1) / (total + 2)  # Laplace's rule
    return (counts + imagined * _uniform_noise(noise, classes)) / (counts.sum(1, keepdims=True) + imagined)


def _noise(T: np.ndarray, given: np.ndarray) -> float:
    """Share of wrong labels, by T."""
    return float(np.bincount(given, minlength=len(T)) / len(given) @ (1 - np.diag(T)))


def _milder(T: np.ndarray, noise: float, pretended: float) -> np.ndarray:
    """T with so much less noise; a little stays, so that no chance is zero."""
    share = max(noise - pretended, 1e-3 * noise) / max(noise, 1e-300)
    return share * T + (1 - share) * np.eye(len(T))


def _uniform_noise(noise: float, classes: int) -> np.ndarray:
    if classes == 1:
        return np.ones((1, 1))
    T = np.full((classes, classes), noise / (classes - 1))
    np.fill_diagonal(T, 1 - noise)
    return T


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)

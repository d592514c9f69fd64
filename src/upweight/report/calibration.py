"""Are the sizes right? Predicted changes against those of models that were really retrained."""

from __future__ import annotations

from typing import Any

import numpy as np

from upweight.evaluate.outcomes import Outcomes, as_scores
from upweight.scores import Scores

__all__ = ["calibration"]

POINTS = 600
"""Pairs kept for the plot; the figures are of all of them."""


def calibration(scores: Scores, outcomes: Outcomes) -> dict[str, Any] | None:
    """How far each retrained model moves each query, predicted and actual, as differences from the query's mean.

    For a query q and a subset S of the training data

        predicted[q, S] = sum of scores[q, i] over the examples i that S leaves out  -  its mean over subsets
        actual[q, S]    = mean over seeds of m_q(theta(S, seed))                     -  its mean over subsets

    both with worse upwards. The slope is that of actual on predicted through the origin, which is the centre of every
    query's cloud: 1 if sizes are right, below 1 if scores are too large.

    Args:
        scores: Of the bank's queries. Those without a unit predict no sizes.
        outcomes: What the retrained models measured.

    Returns:
        ``{"unit", "pairs", "slope", "correlation", "points": [[predicted, actual], ...]}``; None if the scores have no
        unit or predict no differences.

    Example:
        >>> import torch
        >>> masks = np.array([[1, 0], [0, 1], [1, 1]], bool)
        >>> measured = np.array([[[3.0]], [[1.0]], [[0.0]]])  # without example 1: 3; without example 0: 1
        >>> found = calibration(
        ...     Scores(torch.tensor([[2.0, 6.0]]), [0], [0, 1], "nats"), Outcomes(masks, measured)
        ... )
        >>> found["slope"], found["correlation"]
        (0.5, 1.0)
    """
    if scores.unit is None:
        return None
    outcomes = outcomes.complete()
    predicted = as_scores(scores, outcomes) @ (~outcomes.masks).T  # [query, subset]
    actual = outcomes.means.T
    predicted = (predicted - predicted.mean(axis=1, keepdims=True)).ravel()
    actual = (actual - actual.mean(axis=1, keepdims=True)).ravel()
    known = np.isfinite(actual)
    predicted, actual = predicted[known], actual[known]
    squares, products = float(predicted @ predicted), float(predicted @ actual)
    scale = float(np.sqrt(squares * float(actual @ actual)))
    if not squares > 0 or not scale > 0:
        return None
    kept = np.arange(len(actual))
    if len(kept) > POINTS:
        kept = np.sort(np.random.default_rng(0).choice(len(kept), POINTS, replace=False))
    return {
        "unit": scores.unit,
        "pairs": len(actual),
        "slope": products / squares,
        "correlation": products / scale,
        "points": [[float(f"{predicted[k]:.4g}"), float(f"{actual[k]:.4g}")] for k in kept],
    }

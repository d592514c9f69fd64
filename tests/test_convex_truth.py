"""Predicted against real: regressions refitted to machine precision without examples, in float64.

Refitting keeps dividing the sum of losses by n (fixed sum).
"""

from functools import cache

import numpy as np
import pytest
import torch
from refits import Softmax
from sklearn.datasets import load_digits
from torch import Tensor, nn

import upweight as uw

TRAIN, QUERIES, REMOVED, L2 = 1437, 60, 200, 1e-2
TINY = 1e-10
"""Enough damping for the one direction that a softmax leaves free: the same constant on all intercepts."""


def model_of(theta: Tensor) -> nn.Linear:
    model = nn.Linear(theta.shape[1] - 1, theta.shape[0]).double()
    with torch.no_grad():
        model.weight.copy_(theta[:, :-1])
        model.bias.copy_(theta[:, -1])
    return model


def slope_and_pearson(predicted: Tensor, real: Tensor) -> tuple[float, float]:
    """Of the real change on the predicted one, through the origin."""
    p, r = predicted.flatten(), real.flatten()
    return float(p @ r / (p @ p)), float(np.corrcoef(p, r)[0, 1])


@cache
def digits() -> tuple[Softmax, Tensor, Tensor, Tensor]:
    """The problem, its fit, and query images and labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    X, y = torch.from_numpy(data.data / 16)[order], torch.from_numpy(data.target).long()[order]
    problem = Softmax(X[:TRAIN], y[:TRAIN], L2)
    return problem, problem.fit(), X[TRAIN:][:QUERIES], y[TRAIN:][:QUERIES]


def influence(correction: str | None = None) -> uw.Influence:
    problem, theta, _, _ = digits()
    options = {"curvature": "ggn", "damping": TINY, "l2": {"weight": L2}, "solver": "direct"}
    method = uw.Influence(model_of(theta), uw.Classification(), correction=correction, **options)
    return method.fit((problem.X[:, :-1].contiguous(), problem.y))


def test_digits_leave_one_out():
    """200 real removals: influence ranks them, and rescaled influence has their size."""
    problem, theta, Xq, yq = digits()
    ids = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(1))[:REMOVED]
    weights = torch.ones(REMOVED, TRAIN, dtype=torch.float64)
    weights[torch.arange(REMOVED), ids] = 0
    refits = problem.refit(theta, weights)
    real = (problem.losses(refits, Xq, yq) - problem.losses(theta, Xq, yq)).T  # [query, removed]
    slope, pearson = slope_and_pearson(influence().attribute((Xq, yq)).values[:, ids], real)
    assert pearson >= 0.999
    assert slope > 1.03  # first order says too little
    slope, pearson = slope_and_pearson(influence("rescaled").attribute((Xq, yq)).values[:, ids], real)
    assert pearson >= 0.9999
    assert slope == pytest.approx(1, abs=0.02)


def test_digits_without_five_percent():
    """Newton within 2 % of refitting, where the sum of influences is 9 % off."""
    problem, theta, Xq, yq = digits()
    group = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(2))[: TRAIN // 20].tolist()
    weights = torch.ones(1, TRAIN, dtype=torch.float64)
    weights[0, group] = 0
    refit = problem.refit(theta, weights, newton=True)
    real = (problem.losses(refit, Xq, yq) - problem.losses(theta, Xq, yq))[0]
    effect = influence().removal(group, (Xq, yq))

    def error(estimate: str, second_order: bool) -> float:
        return float((effect.effect(estimate, second_order=second_order) - real).norm() / real.norm())

    assert error("newton", True) < 0.02
    assert error("newton", False) < 0.03
    assert error("first_order", False) > 0.08
    assert error("first_order", True) > 0.06
    assert error("newton", True) < error("rescaled", True) < error("first_order", True)


def test_small_logistic_regression():
    """n = 40, d = 6: influence is far too small, rescaled influence nearly right."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(70, 6, generator=generator, dtype=torch.float64)
    y = (
        X @ torch.linspace(-1, 1, 6, dtype=torch.float64) + torch.randn(70, generator=generator).double() > 0
    ).long()
    problem = Softmax(X[:40], y[:40], 0.02)
    theta = problem.fit()
    real = problem.losses(problem.refit(theta, 1 - torch.eye(40, dtype=torch.float64)), X[40:], y[40:])
    real = (real - problem.losses(theta, X[40:], y[40:])).T
    found = {}
    for correction in (None, "rescaled"):
        options = {"curvature": "hessian", "damping": 0.0, "l2": {"weight": 0.02}, "correction": correction}
        method = uw.Influence(model_of(theta), uw.BinaryClassification(), **options)
        scores = method.fit((X[:40], y[:40].double())).attribute((X[40:], y[40:].double()))
        found[correction] = slope_and_pearson(scores.values, real)
    assert found[None][0] > 1.15
    assert found["rescaled"][0] == pytest.approx(1, abs=0.15)
    assert found["rescaled"][1] > 0.98

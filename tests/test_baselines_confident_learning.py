"""Confident learning: flags by the thresholds of classes, and what it refuses."""

import numpy as np
import pytest
import torch
from refusals import refused
from small_problem import TRAIN, logits, small

import upweight as uw

TASK = uw.Classification()
_, Y = TRAIN


def test_confident_learning_flags_by_the_class_thresholds():
    pytest.importorskip("cleanlab", reason="the extra [audit]")
    generator = np.random.default_rng(0)
    y = np.arange(60) % 3
    p = (
        generator.dirichlet(np.ones(3), 60)
        + 0.8 * np.eye(3)[np.where(generator.random(60) < 0.8, y, (y + 1) % 3)]
    )
    p /= p.sum(1, keepdims=True)
    thresholds = np.array([p[y == k, k].mean() for k in range(3)])
    confident = np.where(p >= thresholds, p, -1)
    flagged = {i for i in range(60) if confident[i].max() > 0 and confident[i].argmax() != y[i]}
    found = uw.confident_learning((torch.zeros(60, 1), torch.from_numpy(y)), TASK, probabilities=p)
    assert set(found.info["flagged"]) == flagged and len(flagged) > 3
    torch.testing.assert_close(found.values, torch.from_numpy(1 - p[np.arange(60), y]))
    order = found.values[found.info["flagged"]]
    assert bool((order[:-1] >= order[1:]).all())
    margin = uw.confident_learning(
        (torch.zeros(60, 1), torch.from_numpy(y)), TASK, probabilities=p, rank_by="normalized_margin"
    )
    others = np.where(np.eye(3, dtype=bool)[y], -1, p).max(1)
    torch.testing.assert_close(margin.values, torch.from_numpy((1 - p[np.arange(60), y] + others) / 2))


def test_confident_learning_refuses():
    pytest.importorskip("cleanlab", reason="the extra [audit]")
    p = torch.full((len(Y), 3), 1 / 3)
    for options in ({}, {"probabilities": p, "train_fn": lambda indices, seed: small()}):
        with refused("expected one of them"):
            uw.confident_learning(TRAIN, TASK, **options)
    for wrong, message in (
        (p[:-1], "expected \\[train, class\\]"),
        (logits(), "not logits"),
        (p[:, :2] * 1.5, "label 2 has no column"),
        (torch.full((len(Y), 4), 0.25), "no example has label 3"),
    ):
        with refused(message):
            uw.confident_learning(TRAIN, TASK, probabilities=wrong)
    with refused("the size of the rarest class"):
        uw.confident_learning(TRAIN, TASK, train_fn=lambda indices, seed: small(), folds=50)
    with refused("train_fn returned int"):
        uw.confident_learning(TRAIN, TASK, train_fn=lambda indices, seed: 1, folds=2)

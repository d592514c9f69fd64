"""The control that only counts classes."""

from __future__ import annotations

import torch
from refusals import refused
from torch import nn

import upweight as uw
from upweight.evaluate import lds
from upweight.evaluate.outcomes import Outcomes


def test_it_is_one_where_labels_are_the_same():
    x, y = torch.randn(7, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    method = uw.SameClass(nn.Linear(4, 3), uw.Classification()).fit((x, y), ids=list("abcdefg"))
    scores = method.attribute((x[:2], y[:2]))
    assert scores.values.tolist() == [[1, 0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0, 0]]
    assert scores.unit is None and list(scores.train_ids) == list("abcdefg")
    assert method.self_influence().values.tolist() == [1] * 7


def test_binary_labels_may_be_floats():
    x, y = torch.randn(4, 2), torch.tensor([0.0, 1.0, 1.0, 0.0])
    method = uw.SameClass(nn.Linear(2, 1), uw.BinaryClassification()).fit((x, y))
    assert method.attribute((x[1:2], y[1:2])).values.tolist() == [[0, 1, 1, 0]]


def test_tasks_without_classes_are_refused():
    with refused("task is Regression, expected Classification or BinaryClassification: SameClass compares"):
        uw.SameClass(nn.Linear(2, 1), uw.Regression())


def test_it_finds_what_counting_classes_explains():
    """Retrained models whose loss on a query falls with the number of examples of its class, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=generator), torch.arange(60) % 3
    masks = torch.rand(40, 60, generator=generator) < 0.5
    counts = torch.stack([(masks & (y == c)).sum(1) for c in range(3)], 1)  # [subset, class]
    losses = (-counts[:, y[:9]].double()).exp()[:, None]  # [subset, seed, query]
    outcomes = Outcomes(masks.numpy(), losses.numpy(), list(range(9)), [0])
    scores = uw.SameClass(nn.Linear(4, 3), uw.Classification()).fit((x, y)).attribute((x[:9], y[:9]))
    assert lds(scores, outcomes).value > 0.999

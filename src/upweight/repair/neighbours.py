"""Nearest neighbours among the training examples' embeddings, each example itself left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Neighbours:
    """The nearest of every example, the nearest first.

    Attributes:
        positions: [n, k], k smaller than asked for where there are not so many others.
        cosines: [n, k].
    """

    positions: np.ndarray
    cosines: np.ndarray

    @property
    def distance(self) -> np.ndarray:
        """Mean cosine distance, [n]."""
        return np.maximum(1 - self.cosines.mean(1), 0)


def nearest(features: Tensor, count: int, others: Tensor | None = None) -> Neighbours | None:
    """Neighbours by the cosine of features [n, d] of length 1; None where there is nobody else.

    Args:
        features: of the examples to choose from.
        count: how many of them.
        others: whose neighbours are wanted; those of the examples themselves if None, each without itself.

    Example:
        >>> nearest(torch.eye(2)[[0, 0, 1]], 1).positions.tolist()
        [[1], [0], [0]]
    """
    n, own = len(features), others is None
    count = min(count, n - 1 if own else n)
    if count < 1:
        return None
    others = features if others is None else others
    block = max(1, BLOCK_BYTES // (8 * n))
    positions, cosines = [], []
    for start in range(0, len(others), block):
        products = others[start : start + block] @ features.T
        if own:
            rows = torch.arange(len(products))
            products[rows, rows + start] = -torch.inf
        best = products.topk(count, dim=1)
        positions.append(best.indices)
        cosines.append(best.values.double().clamp(-1, 1))
    return Neighbours(torch.cat(positions).cpu().numpy(), torch.cat(cosines).cpu().numpy())


def votes(neighbours: Neighbours, labels: np.ndarray, classes: int) -> np.ndarray:
    """Share of the neighbours' votes for each class, [n, class], with one vote more that is spread as the labels are.

    Example:
        >>> found = Neighbours(np.array([[1, 2], [0, 2], [0, 1]]), np.ones((3, 2)))
        >>> votes(found, np.array([0, 0, 1]), 2).round(2).tolist()
        [[0.54, 0.46], [0.54, 0.46], [0.88, 0.12]]
    """
    rows, k = neighbours.positions.shape
    counts = np.zeros((rows, classes))
    np.add.at(counts, (np.arange(rows)[:, None], labels[neighbours.positions]), 1.0)
    prior = (np.bincount(labels, minlength=classes) + 1 / classes) / (len(labels) + 1)
    return (counts + prior) / (k + 1)

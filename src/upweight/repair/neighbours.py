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


def nearest(features: Tensor, count: int) -> Neighbours | None:
    """Neighbours by the cosine of features [n, d] of length 1; None where there is nobody else.

    Example:
        >>> nearest(torch.eye(2)[[0, 0, 1]], 1).positions.tolist()
        [[1], [0], [0]]
    """
    n = len(features)
    count = min(count, n - 1)
    if count < 1:
        return None
    block = max(1, BLOCK_BYTES // (8 * n))
    positions, cosines = [], []
    for start in range(0, n, block):
        products = features[start : start + block] @ features.T
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
        [[0.56, 0.44], [0.56, 0.44], [0.89, 0.11]]
    """
    n, k = neighbours.positions.shape
    counts = np.zeros((n, classes))
    np.add.at(counts, (np.arange(n)[:, None], labels[neighbours.positions]), 1.0)
    prior = (np.bincount(labels, minlength=classes) + 1 / classes) / (n + 1)
    return (counts + prior) / (k + 1)

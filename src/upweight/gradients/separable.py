"""A spectral filter as a short sum of products of row and column weights, its length chosen by measured error.

EK-FAC scores need ``sum_{rc} filter[r, c] (left_q left_i)[r] (right_q right_i)[c]`` for every pair. If ``filter ~=
sum_k u_k w_k^T``, a pair costs ``2 k (R + C)`` instead of ``2 R C`` operations. The singular value decomposition is
taken of the filter *weighted* by how much gradient mass each row and column carries, then unweighted; how many terms
are enough is decided by the error of the scores on a probe of real gradients, never by a fixed number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upweight.gradients.blocks import Block, Factored, Spectral

if TYPE_CHECKING:
    from upweight.curvature.curvature import Inverse
    from upweight.gradients.gradients import Gradients

PROBE_QUERIES = 16
FEWEST_TERMS = 8
"""Layers whose exact route costs as little as this many terms are not worth a probe."""
SAFETY = 0.75
"""Terms are accepted at this share of the tolerance: queries differ from the training examples of the probe."""


@dataclass(frozen=True)
class Terms:
    """``filter ~= rows @ cols.T``: rows [R, k], cols [C, k], accepted at this relative error of the probe's scores."""

    rows: Tensor
    cols: Tensor
    error: float

    @property
    def rank(self) -> int:
        return self.rows.shape[1]


def find_terms(inverse: Inverse, sample: Gradients, tolerance: float) -> dict[str, Terms]:
    """Separable terms of every layer of a sample of training gradients that has them within the tolerance.

    Sixteen evenly spaced examples of the sample stand in for queries, the others for training examples.

    Args:
        inverse: the damped inverse curvature.
        sample: gradients of a few hundred training examples, of layers with one position an example.
        tolerance: largest relative error of a layer's scores.
    """
    n = sample.batch
    stride = max(1, n // PROBE_QUERIES)
    found: dict[str, Terms] = {}
    for name, block in sample.items():
        curvature = inverse.curvature.layers[name]
        preconditioned = curvature.precondition(block, inverse.damping[name])
        if not isinstance(block, Factored) or not isinstance(preconditioned, Spectral) or block.groups > 1:
            continue
        left, right = preconditioned.left[0, :, 0], preconditioned.right[0, :, 0]
        query = left[::stride][:PROBE_QUERIES], right[::stride][:PROBE_QUERIES]
        spectral_filter, eigenvalues = preconditioned.filter[0], curvature.eigenvalues[0]
        terms = separate(spectral_filter, eigenvalues, query, (left, right), tolerance * SAFETY)
        if terms is not None:
            found[name] = terms
    return found


def may_separate(block: Block) -> bool:
    """Whether a layer has one position an example and is large enough for the separable route to gain anything."""
    if not isinstance(block, Factored) or block.positions != 1 or block.groups != 1:
        return False
    rows, cols = block.left().shape[-1], block.right().shape[-1]
    return most_terms(rows, cols) >= FEWEST_TERMS


def most_terms(rows: int, cols: int) -> int:
    """Beyond this many terms the exact route is as fast."""
    return int(0.7 * rows * cols / (rows + cols))


def separate(
    spectral_filter: Tensor,
    eigenvalues: Tensor,
    query: tuple[Tensor, Tensor],
    train: tuple[Tensor, Tensor],
    tolerance: float,
) -> Terms | None:
    """The fewest terms whose probe scores are within `tolerance` (relative, Frobenius) of the exact ones.

    Args:
        spectral_filter: [R, C], ``1 / (eigenvalue + damping)``.
        eigenvalues: [R, C], for the weights.
        query: probe queries' left [q, R] and right [q, C] factors in the eigenbasis.
        train: probe training examples' factors [n, R] and [n, C].
        tolerance: largest relative error; 0 asks for the exact route.

    Returns:
        The terms, or None where no number of them is both accurate enough and cheaper than the exact route.
    """
    rows, cols = spectral_filter.shape
    most = most_terms(rows, cols)
    if tolerance <= 0 or most < 1:
        return None
    row_weight, col_weight = _weights(eigenvalues, 1), _weights(eigenvalues, 0)
    weighted = row_weight[:, None] * spectral_filter * col_weight
    left, values, right = torch.linalg.svd(weighted, full_matrices=False)
    u = left * values / row_weight[:, None]
    w = right.mT / col_weight[:, None]
    (left_q, right_q), (left_t, right_t) = query, train
    exact = exact_scores(spectral_filter, query, train)
    norm = exact.norm()
    if not norm > 0:
        return Terms(u[:, :1], w[:, :1], 0.0)
    remaining = exact.clone()
    for k in range(min(most, len(values))):
        remaining -= ((left_q * u[:, k]) @ left_t.mT) * ((right_q * w[:, k]) @ right_t.mT)
        error = float(remaining.norm() / norm)
        if error <= tolerance:
            return Terms(u[:, : k + 1].contiguous(), w[:, : k + 1].contiguous(), error)
    return None


def exact_scores(
    spectral_filter: Tensor, query: tuple[Tensor, Tensor], train: tuple[Tensor, Tensor]
) -> Tensor:
    """Scores [q, n] without any approximation, for a few queries: ``left_i^T [filter o left_q right_q^T] right_i``."""
    (left_q, right_q), (left_t, right_t) = query, train
    filtered = spectral_filter * left_q[:, :, None] * right_q[:, None, :]  # [q, R, C]
    return ((left_t @ filtered) * right_t).sum(-1)


def _weights(eigenvalues: Tensor, axis: int) -> Tensor:
    """Mean gradient mass along an axis, floored: a dead unit's zero must not turn into a division by zero.

    The mass itself, not its root: a score multiplies a query's coordinate with a training example's, and the product
    of two numbers of this variance has this standard deviation.
    """
    mass = eigenvalues.clamp_min(0).mean(axis)
    return mass.clamp_min(float(mass.max()) * 1e-4 + 1e-30)

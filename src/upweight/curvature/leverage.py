"""Leverage: the share of the curvature that is an example's own, and gradients as the others' curvature sees them.

Without example i the curvature is ``H - H_i / n``. Where ``H_i = S_i^T S_i`` has few rows S_i [c, p] (one for a
logistic regression, C - 1 for a softmax over C classes), its inverse follows from that of all examples together:

    h_i = (1/n) S_i (H + damping I)^-1 S_i^T                                        the leverage  [c, c]
    (H - H_i / n + damping I)^-1 g = (H + damping I)^-1 [ g + S_i^T w ],
        w = (I - h_i)^-1 (1/n) S_i (H + damping I)^-1 g                             Woodbury

so that correcting the gradient corrects every score. A group is the same with the rows of all its examples together;
any other change of weights has that change in the place of -1.

Exact wherever S_i^T S_i is the curvature that H sums: generalised linear models, and the Gauss-Newton matrix of any
network. A structured curvature (EK-FAC) is not that sum: see `upweight.curvature.leave_out`.

Source: "Rescaled Influence Functions: Accurate Data Attribution in High Dimension" (arXiv 2506.06656).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from upweight.errors import UpweightError
from upweight.gradients import Gradients
from upweight.gradients.blocks import Block, Dense
from upweight.gradients.contraction import TILE_BYTES, tiles
from upweight.gradients.rowwise import combined, paired_blocks, weighted_sum


class DampedInverse(Protocol):
    """``(H + damping I)^-1`` as an operator on gradients."""

    def __matmul__(self, gradients: Gradients) -> Gradients:
        """Preconditioned gradients."""
        ...

    def quadratic(self, gradients: Gradients) -> Mapping[str, Tensor]:
        """``g^T (H + damping I)^-1 g`` of every example [batch], in parts that add up."""
        ...


def leverages(columns: Sequence[Gradients], inverse: DampedInverse, n: int) -> Tensor:
    """``h_i = (1/n) S_i (H + damping I)^-1 S_i^T`` [batch, c, c] of every example.

    Their traces sum to the effective number of parameters, ``tr (H + damping I)^-1 H``.

    Args:
        columns: the c rows of every example's S_i, one `Gradients` [batch, p] each (`Tracker.fisher`, ``"exact"``).
        inverse: the damped inverse of the curvature of all n examples.
        n: number of training examples.
    """
    return _leverages(columns, [inverse @ column for column in columns], n)


class Each:
    """Every example's own change of weight, one at a time: ``(H + change_i H_i / n + damping I)^-1``.

    Args:
        columns: the c rows of every example's S_i, one `Gradients` [batch, p] each.
        inverse: the damped inverse of the curvature of all n examples.
        n: number of training examples.
        ids: the examples' ids, for the error.
        change: by how much the weight of 1 of each example's rows changes, [batch, c]; -1 (removal) if None.

    Raises:
        UpweightError: an example's leverage reaches 1: without it the curvature is singular.
    """

    def __init__(
        self,
        columns: Sequence[Gradients],
        inverse: DampedInverse,
        n: int,
        ids: Sequence[Any],
        change: Tensor | None = None,
    ) -> None:
        self.columns, self.inverse, self.n = columns, inverse, n
        # One triangular solve a vector where the inverse has a root R: s^T A^-1 t = (R s)^T (R t).
        self._half: Callable[[Gradients], Gradients] | None = getattr(inverse, "half", None)
        self._solved = [(self._half or inverse.__matmul__)(column) for column in columns]
        h = _leverages(self._solved if self._half else columns, self._solved, n)
        self._change = -torch.ones_like(h[..., 0]) if change is None else change.to(h)
        self._middle = _middle(h, self._change, [f"example {name}" for name in ids])

    def correct(self, gradients: Gradients) -> Gradients:
        """Vectors g' [batch, p] with ``(H + damping I)^-1 g'_i = (H + change_i H_i / n + damping I)^-1 g_i``."""
        other = self._half(gradients) if self._half else gradients
        target = _pairs(self._solved, [other])[..., 0] / self.n  # [batch, c]
        weights = -torch.linalg.solve(self._middle, (self._change * target)[..., None])[..., 0]
        return combined(gradients, self.columns, weights)

    def solve(self, gradients: Gradients) -> Gradients:
        """``(H + change_i H_i / n + damping I)^-1 g_i`` for every example."""
        return self.inverse @ self.correct(gradients)


class Group:
    """A group's change of weights, all at once: ``(H + (1/n) sum_i change_i H_i + damping I)^-1``.

    Args:
        columns: the c rows of every member's S_i, one `Gradients` [members, p] each.
        inverse: the damped inverse of the curvature of all n examples.
        n: number of training examples.
        change: by how much each member's weight of 1 changes, [members]; -1 (removal) if None.

    Cost: c inverse-vector products a member, and an eigendecomposition of size c times members.

    Raises:
        UpweightError: with these weights the curvature is singular or negative.
    """

    def __init__(
        self, columns: Sequence[Gradients], inverse: DampedInverse, n: int, change: Tensor | None = None
    ) -> None:
        self.inverse, self.n = inverse, n
        self._rows = Gradients.concatenate(list(columns))  # [c * members, p]
        self._solved = inverse @ self._rows
        h = self._solved @ self._rows.T / n  # [c * members, c * members]
        h = (h + h.mT) / 2
        change = h.new_full((columns[0].batch,), -1.0) if change is None else change.to(h)
        self._change = change.repeat(len(columns))
        self._middle = _middle(h[None], self._change[None], ["the group"])[0]

    def correct(self, gradients: Gradients) -> Gradients:
        """Vectors g' [k, p] with ``(H + damping I)^-1 g' = (H + (1/n) sum_i change_i H_i + damping I)^-1 g``."""
        target = (self._solved @ gradients.T) / self.n  # [c * members, k]
        weights = -torch.linalg.solve(self._middle, self._change[:, None] * target).mT  # [k, c * members]
        added = weighted_sum(self._rows, weights)
        return combined(gradients, [added], torch.ones_like(weights[:, :1]))

    def solve(self, gradients: Gradients) -> Gradients:
        """``(H + (1/n) sum_i change_i H_i + damping I)^-1 g`` for every vector."""
        return self.inverse @ self.correct(gradients)


def _leverages(columns: Sequence[Gradients], solved: Sequence[Gradients], n: int) -> Tensor:
    h = _pairs(solved, columns) / n
    return (h + h.mT) / 2  # symmetric but for rounding, or for a solver's residual


def _pairs(left: Sequence[Gradients], right: Sequence[Gradients]) -> Tensor:
    """Inner products of each example's vectors, [batch, left, right], summed over layers."""
    total: Tensor | None = None
    for name in left[0]:
        a, b = [g[name] for g in left], [g[name] for g in right]
        if all(isinstance(x, Dense) for x in a):  # formed already: one batched product
            part = torch.cat([_products(a, b, rows) for rows in tiles(a[0], TILE_BYTES // (len(a) + len(b)))])
        else:
            part = torch.stack([torch.stack([paired_blocks(x, y) for y in b], 1) for x in a], 1)
        total = part if total is None else total + part
    assert total is not None  # a Gradients holds at least one layer
    return total


def _products(a: Sequence[Block], b: Sequence[Block], rows: slice) -> Tensor:
    left, right = (torch.stack([block[rows].dense() for block in blocks], 1) for blocks in (a, b))
    return left @ right.to(left.dtype).mT


def _middle(h: Tensor, change: Tensor, names: Sequence[str]) -> Tensor:
    """``I + diag(change) h`` [batch, c, c]; raise unless the curvature with these changes is positive.

    With ``h = R R^T`` its eigenvalues relative to before are those of ``I + R^T diag(change) R``.
    """
    values, vectors = torch.linalg.eigh(h.double())
    root = vectors * values.clamp_min(0).sqrt()[:, None, :]
    lowest = torch.linalg.eigvalsh(root.mT @ (change.double()[..., None] * root))[:, 0]
    wrong = ~(lowest > torch.finfo(h.dtype).eps ** 0.5 - 1)
    if wrong.any():
        worst = int(torch.where(wrong, lowest.nan_to_num(-float("inf")), float("inf")).argmin())
        raise UpweightError(
            f"the leverage of {names[worst]} is {-float(lowest[worst]):.4g}, expected below 1: without it the "
            f"curvature is singular or negative ({int(wrong.sum())} such here) -> raise the damping, or use "
            "first-order influence (correction=None, Scores.removal_effect)"
        )
    return torch.eye(h.shape[1], dtype=h.dtype, device=h.device) + change[..., None] * h

"""What every solver of ``(H + damping I) X = B`` takes and gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class LinearOperator(Protocol):
    """A symmetric matrix H [p, p] that is known by its products: the curvature of the mean training loss.

    Attributes:
        size: p.
        positive: whether H is positive semi-definite by construction (a Gauss-Newton matrix or a Fisher).
        products: matrix-vector products over the full data so far; a mini-batch's counts as its share.
        floor: a number >= 0 that H exceeds everywhere by construction, its regulariser: what low-rank methods leave on
            the directions that they leave out, instead of nothing.
    """

    size: int
    positive: bool
    products: float
    floor: float

    def product(self, x: Tensor) -> Tensor:
        """``H x`` for x [p, k]: over all the data, the same bits each time."""
        ...

    def sampled_product(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """``H_batch x`` [p, k]: the mean over these training examples only, and the regulariser."""
        ...

    def dense(self) -> Tensor:
        """H itself [p, p]; raises an `UpweightError` that says how much memory it would take if it does not fit."""
        ...

    @property
    def examples(self) -> int:
        """Training examples n, from which mini-batches are drawn."""
        ...


class Preconditioner(Protocol):
    """An approximate inverse ``M^-1`` of ``H + damping I``, symmetric positive definite."""

    def __matmul__(self, x: Tensor) -> Tensor:
        """``M^-1 x`` for x [p, k]."""
        ...


@dataclass(frozen=True)
class SolveInfo:
    """How well a system was solved.

    Attributes:
        solver: its name.
        damping: what was added to every eigenvalue.
        iterations: steps taken (0 for a closed form).
        residual: ``|b - (H + damping I) x| / |b|`` of every right-hand side [k], by the full operator.
        products: full-data matrix-vector products spent, the check of the residual included.
        seconds: wall time.
        converged: whether every residual is within what the solver promised.
        notes: what else there is to know: the scale found, eigenvalues met, the rank kept.
    """

    solver: str
    damping: float
    iterations: int
    residual: Tensor
    products: float
    seconds: float
    converged: bool
    notes: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """JSON-able, for a result's evidence."""
        residual = self.residual.double()
        return {
            "solver": self.solver,
            "damping": self.damping,
            "iterations": self.iterations,
            "residual_max": float(residual.max()) if residual.numel() else 0.0,
            "residual_median": float(residual.median()) if residual.numel() else 0.0,
            "products": self.products,
            "seconds": round(self.seconds, 3),
            "converged": self.converged,
            **self.notes,
        }


@dataclass(frozen=True)
class Solution:
    """``(H + damping I)^-1 B`` [p, k] and how well it was found."""

    value: Tensor
    info: SolveInfo


class Solver(Protocol):
    """Solves ``(H + damping I) X = B`` for many right-hand sides at once."""

    name: str

    def solve(
        self,
        operator: LinearOperator,
        b: Tensor,
        damping: float,
        preconditioner: Preconditioner | None = None,
    ) -> Solution:
        """The solution for b [p, k].

        Raises:
            UpweightError: the method cannot go on (negative curvature, divergence), and what to do about it.
        """
        ...


def relative_residual(operator: LinearOperator, x: Tensor, b: Tensor, damping: float) -> Tensor:
    """``|b - (H + damping I) x| / |b|`` of every column [k]; 0 for a column of zeros."""
    rest = b - operator.product(x) - damping * x
    norms = torch.linalg.vector_norm(b, dim=0)
    return torch.linalg.vector_norm(rest, dim=0) / norms.clamp_min(torch.finfo(b.dtype).tiny)

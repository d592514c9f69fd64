"""Low-rank inverse from the Krylov space of one random vector."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from upweight.curvature.solvers.base import LinearOperator, Preconditioner, Solution
from upweight.curvature.solvers.common import (
    System,
    check_options,
    check_positive_damping,
    finite,
    random_matrix,
)
from upweight.curvature.solvers.low_rank import LowRankInverse, PerOperator, check_rank
from upweight.errors import UpweightError


class Products(Protocol):
    """A symmetric matrix [size, size] by its products."""

    size: int

    def product(self, x: Tensor, /) -> Tensor: ...


class Arnoldi:
    """Keep the Ritz pairs of H that are largest in absolute value, and invert those.

    ``X = E diag(1/(mu + damping)) E^T B + (1/damping) (B - E E^T B)``, with mu [rank] and E [p, rank] from m steps of
    Lanczos, fully re-orthogonalised. The second term treats the rest of the space as having no curvature but the
    regulariser's, which is added to its damping; without it
    (``complement=False``, the paper's form) that part of every gradient is lost, and with it much of the signal.

    Args:
        rank: Ritz pairs kept.
        iterations: m, products with H; None for twice the rank.
        complement: whether to keep the second term, which needs damping > 0.
        rtol: relative residual above which `solve` warns. The method promises a rank, not a residual.
        seed: of the start vector.

    Cost: m products with single vectors, and 4 p m^2 operations to keep the basis orthogonal; once per operator: new
    right-hand sides and dampings cost 4 p rank operations each, and the check of the residual. Storage: p (m + rank)
    while it runs, p rank after.

    Fails when: much of a right-hand side lies outside the directions kept and the curvature there is not small
    against the damping. The residual shows it. On an indefinite H it inverts negative eigenvalues as they are, and
    ``info.notes`` counts them.

    Source: "Scaling Up Influence Functions" (arXiv 2112.03052).

    Example:
        >>> Arnoldi(rank=20).iterations
        40
    """

    name = "arnoldi"

    def __init__(
        self,
        *,
        rank: int = 100,
        iterations: int | None = None,
        complement: bool = True,
        rtol: float = 1e-2,
        seed: int = 0,
    ) -> None:
        check_options("arnoldi", rank=rank, iterations=iterations, rtol=rtol)
        self.rank, self.complement, self.rtol, self.seed = rank, complement, rtol, seed
        self.iterations = 2 * rank if iterations is None else iterations
        self._kept: PerOperator[tuple[Tensor, Tensor]] = PerOperator()

    def solve(
        self,
        operator: LinearOperator,
        b: Tensor,
        damping: float,
        preconditioner: Preconditioner | None = None,
    ) -> Solution:
        """The low-rank solution for b [p, k]; a preconditioner is of no use to it and ignored.

        Raises:
            UpweightError: a damped Ritz value is zero, no damping for the complement, or bad input.
        """
        system = System(self.name, operator, b, damping)
        values, vectors = self.eigenpairs(operator, b)
        # The complement of the whole space is empty.
        complement = self.complement and vectors.shape[1] < operator.size
        if complement:
            check_positive_damping(self.name, damping + operator.floor, "its complement term divides by it")
        noise = 10 * torch.finfo(b.dtype).eps * float(values.abs().max())
        if operator.positive and damping > 0:
            values = values.clamp_min(operator.floor)  # below it is rounding
        elif float((values + damping).abs().min()) <= noise:
            raise UpweightError(
                f"arnoldi met the eigenvalue {-damping:g}, which damping={damping:g} turns into zero -> use another "
                "damping, larger than any negative eigenvalue, or curvature='ggn'"
            )
        x = LowRankInverse(vectors, values, damping, complement, operator.floor) @ system.b
        notes = {
            "rank": vectors.shape[1],
            "complement": self.complement,
            "largest_eigenvalue": float(values.max()),
            "smallest_eigenvalue_kept": float(values.min()),
            "negative_eigenvalues": int((values < -noise).sum()),
        }
        advice = "raise the rank or the damping, or use solver='cg'"
        return system.solution(x, self.rtol, self._steps(operator), notes, advice)

    def eigenpairs(self, operator: LinearOperator, like: Tensor) -> tuple[Tensor, Tensor]:
        """Ritz values [rank], largest in absolute value first, and vectors [p, rank], in the dtype of `like`."""
        kept = self._kept.get(operator, like)
        if kept is not None:
            return kept
        rank, steps = check_rank(self.name, self.rank, operator.size), self._steps(operator)
        basis, projected = lanczos(operator, like, steps, self.seed)
        values, vectors = torch.linalg.eigh(projected)
        top = values.abs().argsort(descending=True)[: min(rank, steps)]
        return self._kept.keep(operator, like, (values[top], basis @ vectors[:, top]))

    def _steps(self, operator: LinearOperator) -> int:
        return min(self.iterations, operator.size)


def lanczos(operator: Products, like: Tensor, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """An orthonormal basis V [p, steps] of the Krylov space of a random vector, and ``V^T H V``.

    Where the space is exhausted a fresh random direction goes on, so the basis always has `steps` columns.
    """
    generator = torch.Generator().manual_seed(seed)
    eps = torch.finfo(like.dtype).eps
    V = like.new_empty(operator.size, steps)
    T = like.new_zeros(steps, steps)
    v, largest = random_matrix(like, 1, generator), 0.0
    V[:, :1] = v / torch.linalg.vector_norm(v)
    for j in range(steps):
        w = finite("arnoldi", operator.product(V[:, j : j + 1]))
        basis = V[:, : j + 1]
        w, coefficients = _orthogonalised(w, basis)
        T[: j + 1, j] = coefficients[:, 0]
        largest = max(largest, float(torch.linalg.vector_norm(coefficients)))
        if j + 1 == steps:
            break
        length = float(torch.linalg.vector_norm(w))
        if length <= 10 * eps * operator.size**0.5 * largest:  # what is left is rounding
            w = _orthogonalised(random_matrix(like, 1, generator), basis)[0]
            length = float(torch.linalg.vector_norm(w))
        V[:, j + 1 : j + 2] = w / length
    # H is symmetric: what a later product says about an earlier direction stands for both.
    return V, T.triu() + T.triu(1).mT


def _orthogonalised(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """What of w [p, 1] is outside the basis, and the coefficients of what is inside; twice is enough."""
    first = basis.mT @ w
    w = w - basis @ first
    second = basis.mT @ w
    return w - basis @ second, first + second

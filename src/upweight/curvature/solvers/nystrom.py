"""Low-rank inverse from a random sketch of the curvature."""

from __future__ import annotations

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


class Nystrom:
    """Replace H by what a random sketch sees of it, and invert that with damping.

    What the regulariser adds to H is known and left out of the sketch.

    ``H ~ C (W^T C)^+ C^T`` with ``C = H W`` and random orthonormal W [p, rank], kept as ``U diag(values) U^T``; then
    ``X = U diag(1/(values + damping)) U^T B + (1/damping) (B - U U^T B)``. A shift by the rounding of C keeps ``W^T C``
    positive, and is taken off the values again.

    Args:
        rank: columns of the sketch.
        rtol: relative residual above which `solve` warns. The method promises a rank, not a residual.
        seed: of the sketch.

    Cost: `rank` products with H in one call, and 6 p rank^2 operations, once per operator; new right-hand sides and
    dampings cost 4 p rank operations each, and the check of the residual. Storage: p rank.

    Fails when: H is not positive semi-definite (refused), there is no damping (refused), or the damping is below
    eigenvalues that the sketch missed: the residual is then large. `preconditioner` makes a sketch that is too
    coarse to be a solution speed up conjugate gradients, which then is one.

    Source: "Randomized Nyström Preconditioning" (arXiv 2110.02820), algorithm 1.

    Example:
        >>> Nystrom(rank=50).name
        'nystrom'
    """

    name = "nystrom"

    def __init__(self, *, rank: int = 100, rtol: float = 1e-2, seed: int = 0) -> None:
        check_options("nystrom", rank=rank, rtol=rtol)
        self.rank, self.rtol, self.seed = rank, rtol, seed
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
            UpweightError: the operator may be indefinite, no damping, or bad input.
        """
        system = System(self.name, operator, b, damping)
        inverse = self.preconditioner(operator, damping, b)
        notes = {"rank": len(inverse.values), "largest_eigenvalue": float(inverse.values.max())}
        advice = "raise the rank or the damping, or use it as the preconditioner of solver='cg'"
        return system.solution(inverse @ system.b, self.rtol, 0, notes, advice)

    def preconditioner(self, operator: LinearOperator, damping: float, like: Tensor) -> LowRankInverse:
        """The approximate ``(H + damping I)^-1`` as an operator, in the dtype and on the device of `like` [p, k]."""
        if not operator.positive:
            raise UpweightError(
                "nystrom needs a positive semi-definite curvature, this one may have negative eigenvalues -> "
                "curvature='ggn', or solver='arnoldi'"
            )
        check_positive_damping(self.name, damping + operator.floor, "it divides by it outside the sketch")
        values, vectors = self.eigenpairs(operator, like)
        return LowRankInverse(vectors, values, damping, floor=operator.floor)

    def eigenpairs(self, operator: LinearOperator, like: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues [rank], largest first, and vectors [p, rank] of the sketched H."""
        kept = self._kept.get(operator, like)
        if kept is not None:
            return kept
        rank = check_rank(self.name, self.rank, operator.size)
        W = torch.linalg.qr(random_matrix(like, rank, self.seed)).Q
        C = finite(self.name, operator.product(W)) - operator.floor * W
        shift = torch.finfo(like.dtype).eps * float(torch.linalg.matrix_norm(C)) * operator.size**0.5
        C = C + shift * W
        core = W.mT @ C
        values, V = torch.linalg.eigh((core + core.mT) / 2)
        root = (V / values.clamp_min(shift / 2).sqrt()) @ V.mT if shift else V  # (W^T C)^(-1/2)
        U, singular, _ = torch.linalg.svd(C @ root, full_matrices=False)
        return self._kept.keep(operator, like, ((singular.square() - shift).clamp_min(0) + operator.floor, U))

"""A preconditioner from a random sketch of the curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from upweight.curvature.solvers.base import LinearOperator
from upweight.curvature.solvers.common import check_options, check_positive_damping, finite, random_matrix
from upweight.curvature.solvers.low_rank import LowRankInverse, PerOperator, check_rank
from upweight.curvature.solvers.nystrom import Nystrom


class Sketch:
    """The largest eigenvalues of H, roughly, so that conjugate gradients need not find them.

    ``M^-1 = U diag(1/(values + damping)) U^T + (1/(last + damping)) (I - U U^T)``, where last is the smallest value
    kept: what is left out lies between it and nothing. From a Nyström sketch where H is positive semi-definite; else
    the positive Ritz values in the range of ``H W``, W random.

    Args:
        rank: directions kept.
        seed: of the sketch.

    Cost: `rank` products in one call, twice as many for an indefinite H; once per operator, for all right-hand sides
    and dampings. Applying it takes 4 p rank operations a right-hand side. Storage: p rank.

    Source: "Randomized Nyström Preconditioning" (arXiv 2110.02820), equation 1.3.

    Example:
        >>> Sketch(rank=50).rank
        50
    """

    def __init__(self, *, rank: int = 100, seed: int = 0) -> None:
        check_options("sketch", rank=rank)
        self.rank, self.seed = rank, seed
        self._nystrom = Nystrom(rank=rank, seed=seed)
        self._kept: PerOperator[tuple[Tensor, Tensor]] = PerOperator()

    def inverse(self, operator: LinearOperator, damping: float, like: Tensor) -> LowRankInverse:
        """``M^-1`` in the dtype and on the device of `like` [p, k]."""
        values, vectors = self.eigenpairs(operator, like)
        last = max(float(values.min()) if len(values) else 0.0, operator.floor)
        check_positive_damping("sketch", damping + last, "it divides by it where there may be no curvature")
        return LowRankInverse(vectors, values, damping, floor=last)

    def eigenpairs(self, operator: LinearOperator, like: Tensor) -> tuple[Tensor, Tensor]:
        """Positive eigenvalues [rank or fewer], largest first, and vectors [p, .]."""
        if operator.positive:
            return self._nystrom.eigenpairs(operator, like)
        kept = self._kept.get(operator, like)
        if kept is not None:
            return kept
        W = torch.linalg.qr(random_matrix(like, check_rank("sketch", self.rank, operator.size), self.seed)).Q
        Y = torch.linalg.qr(finite("sketch", operator.product(W))).Q
        T = Y.mT @ finite("sketch", operator.product(Y))
        values, vectors = torch.linalg.eigh((T + T.mT) / 2)
        values, vectors = values.flip(0), vectors.flip(1)
        positive = values > max(operator.floor, torch.finfo(like.dtype).eps * float(values.abs().max()))
        return self._kept.keep(operator, like, (values[positive], Y @ vectors[:, positive]))
